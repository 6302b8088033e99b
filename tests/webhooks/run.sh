#!/usr/bin/env bash
# Receivers of webhooks with the specification's own libraries, as they come from the registries. To be run by with-demo.sh.
set -euo pipefail
source=$(cd "$(dirname "$0")" && pwd)
work=$source/../../target/webhooks
mkdir -p "$work"
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r "$source/requirements.txt" "$source/../../clients/python"
cp "$source"/{package.json,package-lock.json,receiver.test.mjs} "$work"
(cd "$work" && npm ci --silent --ignore-scripts)
"$work/venv/bin/python" -W error "$source/receiver_test.py"
(cd "$work" && node --test receiver.test.mjs)
