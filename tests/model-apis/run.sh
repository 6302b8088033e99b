#!/usr/bin/env bash
# The vendors' own clients, and others that speak their APIs, as they come from the registries, against a server whose model is a stub.
# To be run by with-demo.sh.
set -euo pipefail
source=$(cd "$(dirname "$0")" && pwd)
work=$source/../../target/model-apis
mkdir -p "$work"
[ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r "$source/requirements.txt"
cp "$source"/{package.json,package-lock.json,clients.mjs} "$work"
(cd "$work" && npm ci --silent)
# One behind the other: each counts the runs that it leads to.
"$work/venv/bin/python" -m unittest discover -s "$source" -p '*_client.py'
(cd "$work" && node --test clients.mjs)
