"""`run_on_tpu` on a Ray cluster: a function on every host of every slice, started again when a slice is taken away.

`RayClusterContext.run_on_tpu` is what to call. The `run_on_pod…` functions are the same under their former names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fray.errors import InvalidTypeError, PlatformError, UnsupportedError
from fray.job import TpuContext
from fray.tpu import TpuType, tpu_type
from fray.types import RuntimeEnv, TpuRunConfig

__all__ = [
    "get_tpu_config",
    "run_on_pod",
    "run_on_pod_multislice",
    "run_on_pod_multislice_resumable",
    "run_on_pod_resumable",
    "run_on_tpu",
]

# JAX chooses the TPU by itself where it may choose; elsewhere Fray keeps it on the CPU.
_DEFAULTS = {"JAX_PLATFORMS": ""}
_NOT_FOR_HOSTS = ("maximum_resources", "container_image", "extras")


def get_tpu_config(name: str) -> TpuType:
    """Look up a TPU type: its chips, hosts, and chips per host. The same as `fray.tpu.tpu_type`."""
    return tpu_type(name)


def run_on_tpu(
    fn: Callable[[TpuContext], Any],
    config: TpuRunConfig,
    runtime_env: RuntimeEnv | None = None,
    *,
    defaults: Mapping[str, str] | None = None,
    setup_seconds: float = 1800.0,
    grace_seconds: float = 10.0,
    native: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Call `fn(ctx)` once on every host of every slice of the Ray cluster that this process belongs to.

    Args:
        fn: Pickled with its closure, once.
        config: Which slices, how many, and the budgets.
        runtime_env: `env`, `secrets` and `package_requirements` of the function's processes; `minimum_resources` of
            each host beside its chips.
        defaults: Variables of the function's environment, unless they are set.
        setup_seconds: How long the hosts may take to be ready, packages installed.
        grace_seconds: What the function's processes have between SIGTERM and SIGKILL.
        native: More of Ray's own runtime environment.

    Returns:
        What `fn` returned, slice by slice, in the order of the hosts.

    Raises:
        Exception: What `fn` raised, past the budget of failures, or where it can be seen that it will again.
        HostFailedError: A host's process crashed or hung, so often.
        PreemptedError: Slices were taken away more often than is made good.
        StockoutError: They did not come within `config.wait_seconds`; nothing is held.
        PlatformError: The function cannot be brought to run on the hosts.
        InvalidValueError: There is no such TPU type.
        UnsupportedError: `runtime_env` asks for what the hosts of a slice cannot have of their own.
    """
    kind = check_run(fn, config, runtime_env)
    import ray
    import ray.cloudpickle
    from fray.backend.ray._tpu_run import Pace, run

    if not ray.is_initialized():
        raise PlatformError("run_on_tpu needs a process that belongs to a Ray cluster: call ray.init() first")
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        raise UnsupportedError(
            "run_on_tpu cannot be called through Ray Client (ray://…), whose connection the hosts cannot reach back "
            "over: submit a job that calls it (`fray run -c ray -- python train.py`)"
        )
    environment = _environment(runtime_env or RuntimeEnv(), defaults or {}, native or {})
    function = ray.put(ray.cloudpickle.dumps(fn))  # type: ignore[no-untyped-call]
    return run(function, kind, config, environment, setup_seconds=setup_seconds, pace=Pace(grace_seconds=grace_seconds))


def run_on_pod(
    remote_fn: Callable[[], Any],
    tpu_type: str,
    num_slices: int = 1,
    *,
    max_retries_preemption: int = 10000,
    max_retries_failure: int = 10,
) -> list[Any]:
    """Call a function without arguments on every host of every slice; see `run_on_tpu`.

    Args:
        remote_fn: A function, or one that `ray.remote` has wrapped.
        tpu_type: Such as `v4-32`.
        num_slices: How many slices.
        max_retries_preemption: How many preemptions are made good.
        max_retries_failure: How many failures of the function are.
    """
    fn = getattr(remote_fn, "_function", remote_fn)
    if not callable(fn):
        raise InvalidTypeError(f"run_on_pod takes a function without arguments, got {remote_fn!r}")
    config = TpuRunConfig(tpu_type, num_slices, max_retries_preemption, max_retries_failure)
    return run_on_tpu(lambda _: fn(), config)


run_on_pod_resumable = run_on_pod
"""On one slice."""

run_on_pod_multislice_resumable = run_on_pod
"""On as many slices as its third argument says."""


def run_on_pod_multislice(remote_fn: Callable[[], Any], tpu_type: str, num_slices: int) -> list[Any]:
    """`run_on_pod` on several slices, and only once."""
    return run_on_pod(remote_fn, tpu_type, num_slices, max_retries_preemption=0, max_retries_failure=0)


def check_run(fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None) -> TpuType:
    """Refuse what `run_on_tpu` cannot be asked for; return the type of its slices."""
    if not callable(fn):
        raise InvalidTypeError(f"run_on_tpu takes a function of one argument (its TpuContext), got {fn!r}")
    if not isinstance(config, TpuRunConfig):
        raise InvalidTypeError(f"config must be a TpuRunConfig, got {config!r}")
    kind = tpu_type(config.tpu_type)
    for name in _NOT_FOR_HOSTS:
        if getattr(runtime_env, name, None):
            raise UnsupportedError(
                f"the hosts of a slice cannot have runtime_env.{name} of their own: give it to the job"
            )
    if runtime_env is not None and any(each.name in ("TPU", "GPU") for each in runtime_env.minimum_resources):
        raise UnsupportedError("runtime_env.minimum_resources: run_on_tpu takes all chips of its hosts, and no others")
    return kind


def _environment(env: RuntimeEnv, defaults: Mapping[str, str], native: Mapping[str, Any]) -> Any:
    import ray
    from fray.backend.ray._runtime_env import build_ray_runtime_env
    from fray.backend.ray._tpu_attempt import HostEnvironment

    of_job = dict(ray.get_runtime_context().runtime_env)
    built = {**build_ray_runtime_env(env), **native}
    if built.get("py_modules") and of_job.get("py_modules"):
        # A runtime environment's own field takes the place of the job's.
        built["py_modules"] = list(dict.fromkeys([*of_job["py_modules"], *built["py_modules"]]))
    variables = {**of_job.get("env_vars", {}), **env.env}
    return HostEnvironment(
        runtime_env=built,
        secrets=dict(env.secrets),
        own={**variables, **env.secrets},
        defaults={**_DEFAULTS, **defaults},
        resources={each.name: each.quantity for each in env.minimum_resources if each.quantity},
    )
