#!/usr/bin/env bash
# Runs a command beside a demo server, which it finds by CLAWDFORGE_URL, CLAWDFORGE_TOKEN (an app's) and
# CLAWDFORGE_ADMIN_TOKEN. Needs a debug build: cargo build.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
printed=$(mktemp)
"$root/target/debug/clawdforge" demo >"$printed" 2>&1 &
demo=$!
stop() {
    kill -TERM $demo 2>/dev/null || true
    wait $demo || true
    rm -f "$printed"
}
trap stop EXIT

# It may have to install the CLIs first.
end=$((SECONDS + 300))
until grep -q '^Serving until' "$printed"; do
    if ! kill -0 $demo 2>/dev/null || [ $SECONDS -gt $end ]; then
        cat "$printed" >&2
        exit 1
    fi
    sleep 0.2
done
CLAWDFORGE_URL=$(sed -n 's/^The server listens on \(http:[^;]*\);.*/\1/p' "$printed")
CLAWDFORGE_TOKEN=$(sed -n 's/^App token *//p' "$printed")
CLAWDFORGE_ADMIN_TOKEN=$(sed -n 's/^Admin token *//p' "$printed")
export CLAWDFORGE_URL CLAWDFORGE_TOKEN CLAWDFORGE_ADMIN_TOKEN
"$@"
