#!/usr/bin/env bash
# Installs agents beside claude where it stands, each as its lockfile has it, and links their programs into bin:
# npm/agents.sh codex,gemini. The image is built by it.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p bin
for agent in ${1//,/ }; do
    optional=()
    case $agent in
        claude) continue ;; # It is always in.
        codex) programs=(codex-acp codex) ;;
        # Optional: keyrings, terminals, pictures, sounds.
        gemini | qwen)
            programs=("$agent")
            optional=(--omit=optional)
            ;;
        opencode) programs=(opencode) ;;
        *)
            echo "AGENTS: there is no agent \"$agent\"; name some of claude, codex, gemini, opencode, qwen" >&2
            exit 1
            ;;
    esac
    (cd "$agent" && npm install --no-save --ignore-scripts --no-audit --no-fund --loglevel=error "${optional[@]}")
    for program in "${programs[@]}"; do
        # The last is opencode's: its platform's package names no program.
        for found in "$agent/node_modules/.bin/$program" "$agent"/node_modules/*/bin/"$program"; do
            [ ! -x "$found" ] || ln -sf "../$found" "bin/$program"
        done
        [ -x "bin/$program" ] || {
            echo "$agent's install has no program $program" >&2
            exit 1
        }
    done
    # What no session needs: a voice, and other systems' programs.
    rm -rf "$agent"/node_modules/@openai/codex-linux-*/vendor/*/codex-resources/voice \
        "$agent"/node_modules/@qwen-code/qwen-code/vendor/ripgrep/*-{darwin,win32}
done
