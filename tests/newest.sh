#!/usr/bin/env bash
# Runs the agents' tests with the newest CLIs that npm offers, and prints a table of them. For other versions:
# CLAUDE=2.1.197 ACPX=0.19.1 ADAPTER=0.49.0 tests/newest.sh [NAME OF A TEST…]
set -euo pipefail
cd "$(dirname "$0")/.."
clis=$PWD/target/newest
install() {
    local folder=$clis/$1 npm_options=$2
    shift 2
    mkdir -p "$folder"
    echo '{"private": true}' > "$folder/package.json"
    # shellcheck disable=SC2086 # none, or one option
    (cd "$folder" && npm install --ignore-scripts --no-audit --no-fund --no-package-lock --loglevel=error $npm_options "$@" >&2)
}
node=$(grep -om1 '[0-9]*\.[0-9]*\.[0-9]*' npm/node/package.json)
arch=$([ "$(uname -m)" = aarch64 ] && echo arm64 || echo x64)
install node "" "node-linux-$arch@$node"
install claude "" "@anthropic-ai/claude-code@${CLAUDE:-latest}"
node "$clis/claude/node_modules/@anthropic-ai/claude-code/install.cjs" >&2
# What is optional is a second copy of claude.
install acpx --omit=optional "acpx@${ACPX:-latest}" "@agentclientprotocol/claude-agent-acp@${ADAPTER:-latest}"

version() { node -p "require('$clis/$1/node_modules/$2/package.json').version"; }
printf 'claude %s, acpx %s, claude-agent-acp %s, node %s\n\n' "$(version claude @anthropic-ai/claude-code)" "$(version acpx acpx)" \
    "$(version acpx @agentclientprotocol/claude-agent-acp)" "$node"
log=$clis/log
CI=true CLAWDFORGE_TEST_CLIS=$clis cargo test --no-fail-fast --test agents --test attacks -- "$@" > "$log" 2>&1 || true
awk '$1 == "test" && $3 == "..." { printf "%-8s %s\n", toupper($4) == "OK" ? "ok" : $4, $2; seen++; if ($4 != "ok") failed++ }
     END { printf "\n%d passed, %d failed\n", seen - failed, failed; exit failed > 0 || !seen }' "$log" || {
    echo "The whole output is in $log" >&2
    exit 1
}
