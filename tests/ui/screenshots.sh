#!/usr/bin/env bash
# Makes the documentation's pictures of the page anew, in docs/: tests/with-demo.sh tests/ui/screenshots.sh
set -euo pipefail
source=$(cd "$(dirname "$0")" && pwd)
work=$source/../../target/ui
mkdir -p "$work"
cp "$source"/{package.json,package-lock.json,browser.mjs,screenshots.mjs} "$work"
(cd "$work" && npm ci --silent --ignore-scripts)
(cd "$work" && node screenshots.mjs "$source/../../docs")
