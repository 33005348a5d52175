"""Jobs, tasks and actors on Ray clusters: the backend and the job context named `ray`.

`ray_cluster` submits jobs, `ray_job` gives tasks and actors inside them, `ray_deps` turns a uv lock into a Ray runtime
environment. Importing this package imports none of them, and no Ray.
"""
