# From here on it is the same for every slice. It runs as root whenever the host boots, and may run any number of times.
readonly directory=${FRAY_TPU_DIRECTORY:-/opt/fray}

main() {
    mkdir -p "$directory"
    cd "$directory"
    write_settings >settings.json
    write_agent >agent.py
    rm -f prepared
    # The agent first: a time to live holds also where what comes now fails, or hangs. It waits for it before it joins.
    if [ -d /run/systemd/system ] && [ -z "${GCE_METADATA_HOST:-}" ]; then
        install_service
        prepare
    else
        # A host that is simulated leaves the machine that it runs on alone.
        prepare &
        exec python3 agent.py settings.json
    fi
}

prepare() {
    run_setup
    if [ -n "$ray_version" ] && [ -z "${FRAY_RAY:-}" ]; then
        again_and_again install_uv
        again_and_again install_ray
    fi
    touch prepared
}

say() {
    echo "fray: $*" >&2
}

# The package index, or the network, may not be there yet when the host boots.
again_and_again() {
    local pause=1
    while true; do
        "$1" & # `set -e` would not hold in a condition
        if wait "$!"; then
            return
        fi
        say "$1 failed; again in $pause s"
        sleep "$pause"
        pause=$((pause < 30 ? pause * 2 : 60))
    done
}

run_setup() {
    [ "$has_setup" = true ] || return 0
    say "runs the setup script"
    write_setup >setup
    chmod 0755 setup
    ./setup || {
        local code=$?
        say "the setup script failed with $code, so this host does not join Ray"
        exit "$code"
    }
}

install_uv() {
    [ ! -x uv/bin/uv ] || return 0
    say "installs uv"
    rm -rf uv
    if python3 -m pip --version >/dev/null 2>&1; then
        PIP_ROOT_USER_ACTION=ignore python3 -m pip install --quiet --disable-pip-version-check --target uv "$uv_requirement"
    else
        # Ubuntu's and Debian's Python may come without pip.
        curl --proto '=https' --fail --silent --show-error --location https://astral.sh/uv/install.sh |
            env UV_INSTALL_DIR="$directory/uv/bin" UV_NO_MODIFY_PATH=1 sh
    fi
}

# The note of what was installed is written last: an installation that was broken off is none.
install_ray() {
    local wanted="$python_version pip uv ${requirements[*]}"
    [ "$(cat ray/made-of 2>/dev/null)" != "$wanted" ] || return 0
    say "installs ${requirements[*]} on Python $python_version"
    rm -rf ray
    uv/bin/uv venv --quiet --python "$python_version" ray
    # With pip and uv, by which Ray installs what jobs want beside this.
    uv/bin/uv pip install --quiet --python ray/bin/python pip "$uv_requirement" "${requirements[@]}"
    echo "$wanted" >ray/made-of
}

# With systemd the agent outlives this script, and is started again should it fail.
install_service() {
    local python
    python=$(command -v python3)
    cat >/etc/systemd/system/fray-agent.service <<UNIT
[Unit]
Description=Fray: this host's part in its TPU slice
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart=$python $directory/agent.py $directory/settings.json
Restart=on-failure
RestartSec=5
KillMode=mixed
TimeoutStopSec=40
LimitNOFILE=1048576
UNIT
    systemctl daemon-reload
    systemctl restart fray-agent.service
    say "the agent runs: journalctl -u fray-agent"
}

main
