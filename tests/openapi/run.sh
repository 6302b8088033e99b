#!/usr/bin/env bash
# Generates a TypeScript client's types from /openapi.json, compiles a program against them, and runs it. To be run by
# with-demo.sh.
set -euo pipefail
source=$(cd "$(dirname "$0")" && pwd)
work=$source/../../target/openapi
mkdir -p "$work"
cp "$source"/{package.json,package-lock.json,tsconfig.json,program.ts} "$work"
cd "$work"
npm ci --silent
curl -sf "$CLAWDFORGE_URL/openapi.json" -o openapi.json
node_modules/.bin/openapi-typescript openapi.json --output api.ts
node_modules/.bin/tsc --project .
node program.js
