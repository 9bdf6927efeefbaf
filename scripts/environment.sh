# Sourced by the scripts beside it: makes the environment in .venv inside the clone and installs tvjax with extras.
# Usage: . scripts/environment.sh EXTRAS [VENV] [PYTHON]   (EXTRAS such as "test", or "" for none)
make_environment() {
    extras=$1
    venv=${2:-.venv}
    python=${3:-}
    if [ -z "$python" ]; then
        for candidate in python3 python3.13 python3.12 python3.11; do
            if command -v "$candidate" >/dev/null 2>&1 &&
                "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
                python=$candidate
                break
            fi
        done
    fi
    if [ -z "$python" ]; then
        echo "tvjax needs Python 3.11 or newer, and none was found on the PATH" >&2
        return 1
    fi
    spec=".${extras:+[$extras]}"
    stamp="$venv/.tvjax-installed-${extras:-plain}"
    if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ]; then
        return 0
    fi
    echo "installing tvjax into $venv ..." >&2
    if command -v uv >/dev/null 2>&1; then
        [ -x "$venv/bin/python" ] || uv venv --quiet --python "$python" "$venv" || return 1
        uv pip install --quiet --python "$venv/bin/python" -e "$spec" || return 1
    else
        [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || return 1
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$spec" || return 1
    fi
    touch "$stamp"
}
