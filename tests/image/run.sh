#!/usr/bin/env bash
# Builds the image from a clean clone of HEAD and tries it as an operator would: the real service under Docker Compose, the
# real CLIs, and the model stub in a container beside it. Needs a Docker engine that has, or can fetch, the base images.
# Takes some eight minutes. Leaves no container, volume, network or image of its own.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
project=clawdforge-test-$$
export COMPOSE_PROJECT_NAME=$project COMPOSE_PROGRESS=plain
# Nothing of the caller's own settings.
for variable in $(compgen -e); do
    case $variable in CLAWDFORGE_* | ANTHROPIC_* | CLAUDE_* | CODEX_* | GEMINI_* | GOOGLE_* | OPENAI_* | OPENCODE_* | COMPOSE_FILE) unset "$variable" ;; esac
done

checked=()
ok() {
    checked+=("$*")
    printf '  ok  %s\n' "$*"
}
die() {
    printf 'FAILED: %s\n' "$*" >&2
    dc logs --tail 30 clawdforge >&2 || true
    exit 1
}
# poll SECONDS WHAT COMMAND…
poll() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >"$work/poll" 2>&1; do
        [ $SECONDS -lt $end ] || die "$what: $(cat "$work/poll")"
        sleep 0.5
    done
}
dc() { docker compose --project-directory "$work/clone" --env-file "$work/env" -f "$work/clone/compose.yml" -f "$work/override.yml" "$@"; }
finish() {
    dc --profile "*" down --volumes --timeout 5 >"$work/down" 2>&1 || cat "$work/down"
    # shellcheck disable=SC2046
    docker image rm --force $(docker image ls --quiet --filter "label=$project") >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT

# settings LINE… writes .env; the model is the stub.
settings() { printf '%s\n' CLAWDFORGE_PUBLISH=127.0.0.1:0 ANTHROPIC_BASE_URL=http://model:9000 "$@" >"$work/env"; }
up() {
    dc up -d "$@" >"$work/up" 2>&1 || die "up: $(cat "$work/up")"
    url=http://$(dc port clawdforge 8800)
    poll 30 "the server does not answer" curl -sf -o "$work/healthz" "$url/healthz"
}
# call PATH [CURL OPTION…]: the body goes to $answer, the status to $status.
call() {
    local path=$1
    shift
    status=$(curl -s -m 120 -o "$work/answer" -w '%{http_code}' "$url$path" -H "Authorization: Bearer $token" "$@") || status=none
    answer=$(cat "$work/answer")
}
json() { call "$1" -H 'Content-Type: application/json' -d "$2"; }
# value KEY: of the answer.
value() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$work/answer" "$1"; }
# ledger SQL: of a backup, so that the server goes on.
ledger() {
    dc exec -T clawdforge clawdforge backup - >"$work/ledger.db"
    python3 -c 'import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute(sys.argv[2]).fetchone()[0])' "$work/ledger.db" "$1"
}
container() { dc ps --all --quiet clawdforge; }
health() { [ "$(docker inspect --format '{{.State.Health.Status}}' "$(container)")" = "$1" ]; }
turn() {
    json "/sessions/$session/turn" "{\"prompt\": \"$1\"}"
    [ "$status" = 200 ] || die "a turn: $status $answer"
}
remembers() {
    turn 'stub: {\"echo\": true}'
    [[ $(value text) == *"My name is Mio."* ]] || die "$1: the session has forgotten"
    ok "$1"
}

cat >"$work/override.yml" <<EOF
services:
  clawdforge:
    image: $project
    build: { labels: { $project: "" } }
    healthcheck: { interval: 1s, timeout: 8s, retries: 2 }
  model:
    image: $project
    command: ["demo", "--model-only", "--bind", "0.0.0.0:9000"]
    healthcheck: { disable: true }
    depends_on: [clawdforge]
EOF

echo "== build"
git clone --quiet . "$work/clone"
# As it stands in the file, without the test's own settings.
(cd "$work/clone" && docker compose --env-file /dev/null config) | grep -q 'host_ip: 127.0.0.1' || die "a first start is not on loopback"
ok "a first start is published on loopback alone"
settings ANTHROPIC_API_KEY=key
dc build >"$work/build" 2>&1 || { tail -30 "$work/build"; die "the build"; }
size=$(($(docker image inspect --format '{{.Size}}' "$project") / 1000000))
[ $size -lt 900 ] || die "the image has $size MB"
ok "it builds from a clean clone, and has $size MB"

echo "== run"
up
token=$(dc exec -T clawdforge clawdforge token create app 2>"$work/told")
json /run '{"prompt": "Say hello."}'
[ "$status" = 200 ] || die "a run: $status $answer"
ok "a run through the published port"
json /sessions '{}'
session=$(value session_id)
turn 'My name is Mio.'
remembers "a session of two turns"
poll 30 "it is not healthy" health healthy
ok "it is healthy, and its agents' sandbox is: $(curl -s "$url/healthz" | grep -o '"sandbox":"[a-z]*"')"

inside() { dc exec -T clawdforge "$@"; }
# shellcheck disable=SC2016
inside sh -c '
    test "$(cat /proc/1/comm)" = tini && test "$(id -u)" = 1000 || exit 1
    read -r server < /proc/1/task/1/children
    grep -q "CapBnd:.0000000000000000" /proc/$server/status && grep -q "NoNewPrivs:.1" /proc/$server/status || exit 2
    for place in / /etc /usr/local/bin /opt; do ! touch $place/x 2>/dev/null || exit 3; done
    touch ~/x /tmp/x && rm ~/x /tmp/x' || die "the container is not closed: check $?"
limits=$(docker inspect --format '{{.HostConfig.PidsLimit}} {{.HostConfig.Memory}}' "$(container)")
[ "$limits" = "4096 6442450944" ] || die "limits: $limits"
ok "an init, an ordinary user, no capabilities, no new privileges, a root that can't be written, limits of processes and memory"

echo "== restart and rebuild"
dc restart >"$work/up" 2>&1
up
remembers "a restart keeps the session"
echo "// A line more." >>"$work/clone/src/main.rs"
up --build
[ "$(grep -c 'Compiling' "$work/up")" = 1 ] || die "more than clawdforge itself was built again"
remembers "a rebuild keeps the session, and compiles nothing but what changed"
ledger "SELECT count(*) FROM runs WHERE finished_at IS NULL" | grep -qx 0 || die "rows are left open"

echo "== sign in"
signed_in() {
    json /run '{"prompt": "stub: {\"credential\": true}"}'
    [ "$(value result)" = "$1" ] || die "$2: $answer"
    ok "signed in by $2"
}
settings
up
oauth='{"claudeAiOauth": {"accessToken": "token-1", "refreshToken": "r", "expiresAt": 4102444800000, "scopes": ["user:inference"]}}'
inside sh -c 'umask 077; cat > ~/.claude/.credentials.json' <<<"$oauth"
dc up -d --force-recreate clawdforge >"$work/up" 2>&1
up
signed_in "authorization: Bearer token-1" "what claude leaves in its volume, after a new container"
inside rm /home/clawdforge/.claude/.credentials.json
for way in "CLAUDE_CODE_OAUTH_TOKEN authorization: Bearer " "ANTHROPIC_API_KEY x-api-key: "; do
    variable=${way%% *}
    settings "$variable=token-2"
    up
    signed_in "${way#* }token-2" "$variable"
    echo token-3 >"$work/clone/secrets/token"
    settings "${variable}_FILE=/run/secrets/token"
    up
    signed_in "${way#* }token-3" "${variable}_FILE"
done
settings ANTHROPIC_API_KEY=key "ANTHROPIC_API_KEY_FILE=/run/secrets/nowhere"
dc up -d >"$work/up" 2>&1
both_told() { dc logs clawdforge | grep "ANTHROPIC_API_KEY_FILE and ANTHROPIC_API_KEY are both set"; }
poll 30 "a start with two keys goes on" both_told
ok "a start with the sign-in given twice says so"

echo "== stop and kill"
settings ANTHROPIC_API_KEY=key CLAWDFORGE_DRAIN_SECS=8
up
one_runs() { [ "$(ledger "SELECT count(*) FROM runs WHERE finished_at IS NULL")" = 1 ]; }
# slow SECONDS: a run in the background, whose answer goes to $work/slow.
slow() {
    curl -s -m 120 -o "$work/slow" "$url/run" -H "Authorization: Bearer $token" -H 'Content-Type: application/json' \
        -d "{\"prompt\": \"stub: {\\\"delay_ms\\\": ${1}000}\"}" &
    running=$!
    poll 20 "the run does not begin" one_runs
}
stopped() {
    local begun=$SECONDS
    dc stop clawdforge >"$work/up" 2>&1
    took=$((SECONDS - begun))
    [ "$(docker inspect --format '{{.State.ExitCode}}' "$(container)")" = 0 ] || die "it did not stop by itself"
}
slow 4
stopped
wait $running
grep -q '"ok":true' "$work/slow" || die "a stop lost a run: $(cat "$work/slow")"
ok "a stop waits for a run, and took $took s"
up
slow 100
stopped
wait $running
grep -q '"stop_reason":"error"' "$work/slow" || die "a stop lost a run: $(cat "$work/slow")"
[ $took -lt 60 ] || die "the stop took $took s"
up
[ "$(ledger "SELECT stop_reason FROM runs ORDER BY started_at DESC LIMIT 1")" = interrupted ] || die "the run's row is not settled"
ok "a stop ends a run that takes too long within the grace ($took s), tells its client, and settles its row"
slow 100
dc kill clawdforge >"$work/up" 2>&1
wait $running || true
up
[ "$(ledger "SELECT stop_reason FROM runs ORDER BY started_at DESC LIMIT 1")" = interrupted ] || die "the run's row is not settled"
[ -z "$(inside ls /data/runs)" ] || die "the run's folder is left"
remembers "a container killed in the middle of a run starts again, settles the run and keeps the session"

echo "== health"
server=$(inside cat /proc/1/task/1/children | tr -d " ")
poll 30 "it is not healthy" health healthy
inside sh -c "kill -STOP $server"
poll 60 "a server that hangs is healthy" health unhealthy
inside sh -c "kill -CONT $server"
poll 30 "it is not healthy again" health healthy
ok "a server that hangs turns unhealthy, and healthy again when it goes on"

echo "== backup"
inside clawdforge backup - >"$work/backup.db"
json /run '{"prompt": "A run that is not in the backup."}'
stopped
dc run --rm -T clawdforge restore - <"$work/backup.db" >"$work/restored" 2>&1 || die "restore: $(cat "$work/restored")"
up
[ "$(ledger "SELECT count(*) FROM runs WHERE prompt LIKE 'A run that is not%'")" = 0 ] || die "the backup was not restored"
remembers "a backup is taken while it runs, and restored"

echo "== a secret file that changes, another user"
echo token-4 >"$work/clone/secrets/token"
settings ANTHROPIC_API_KEY_FILE=/run/secrets/token
up
signed_in "x-api-key: token-4" "a secret file"
echo token-5 >"$work/clone/secrets/token"
dc restart clawdforge >"$work/up" 2>&1
up
signed_in "x-api-key: token-5" "what the file holds after a restart"
settings ANTHROPIC_API_KEY=key

echo "== a full disk, a wrong owner, a folder of the host"
volume() { # NAME MOUNT-OPTIONS: a volume in memory
    printf 'volumes:\n  %s:\n    driver: local\n    driver_opts: { type: tmpfs, device: tmpfs, o: "%s" }\n' "$1" "$2"
}
cp "$work/override.yml" "$work/plain.yml"
dc down --volumes --timeout 5 >"$work/down" 2>&1
volume data size=6m,uid=1000,gid=1000,mode=0700 >>"$work/override.yml"
up
token=$(inside clawdforge token create app 2>"$work/told")
inside sh -c 'head -c 8000000 /dev/zero > /data/filler' 2>"$work/told" || true
json /run '{"prompt": "Is there space?"}'
[[ $status == 503 && $answer == *"free some space"* ]] || die "a run on a full disk: $status $answer"
call /files -F "file=@$work/ledger.db"
[[ $status == 503 && $answer == *"disk"* ]] || die "an upload on a full disk: $status $answer"
[ -z "$(inside find /data/files /data/runs -mindepth 1)" ] || die "something half-written is left"
call /healthz
[ "$status" = 200 ] || die "the health check on a full disk: $status"
inside rm /data/filler
json /run '{"prompt": "Is there space?"}'
[ "$status" = 200 ] || die "a run after the disk was full: $status $answer"
ok "a full data folder is told, leaves nothing half-written, and is over when there is space"

for place in data /data claude /home/clawdforge/.claude; do
    case $place in /*) ;; *)
        name=$place
        continue
        ;;
    esac
    dc down --volumes --timeout 5 >"$work/down" 2>&1
    cp "$work/plain.yml" "$work/override.yml"
    volume "$name" uid=0,gid=0,mode=0700 >>"$work/override.yml"
    if dc run --rm -T clawdforge serve >"$work/told" 2>&1; then die "it starts although $place is root's"; fi
    grep -q "the folder $place belongs to user 0 and can't be written by user 1000" "$work/told" || die "$place: $(cat "$work/told")"
    [ "$(grep -c '^clawdforge: ' "$work/told")" = 1 ] || die "$place: $(cat "$work/told")"
done
ok "a mount with the wrong owner stops the start with one sentence, either of the two"

dc down --volumes --timeout 5 >"$work/down" 2>&1
cp "$work/plain.yml" "$work/override.yml"
mkdir "$work/data"
# As the folder of the user who starts it would be.
docker run --rm --volume "$work:/work" --user 0 --entrypoint chown "$project" 1234:1234 /work/data
settings ANTHROPIC_API_KEY=key "CLAWDFORGE_DATA_VOLUME=$work/data" CLAWDFORGE_UID=1234 CLAWDFORGE_GID=1234
up --build
token=$(inside clawdforge token create app 2>"$work/told")
json /run '{"prompt": "Say hello."}'
[ "$status" = 200 ] || die "a run with a folder of the host: $status $answer"
[ "$(docker run --rm --volume "$work:/work" --user 0 --entrypoint stat "$project" -c %u:%a /work/data)" = 1234:700 ] || die "the folder's mode"
ok "a folder of the host's user serves as it is, whose id the image is built with"
dc down --volumes --timeout 5 >"$work/down" 2>&1
docker run --rm --volume "$work:/work" --user 0 --entrypoint rm "$project" -r /work/data

echo "== another agent"
cp "$work/plain.yml" "$work/override.yml"
settings ANTHROPIC_API_KEY=key CLAWDFORGE_AGENTS=claude,gemini GEMINI_API_KEY=key GOOGLE_GEMINI_BASE_URL=http://model:9000
up --build
token=$(inside clawdforge token create app 2>"$work/told")
json /sessions '{"agent": "gemini"}'
session=$(value session_id)
turn 'My name is Mio.'
remembers "gemini is in an image that is to have it"
if inside sh -c 'command -v codex'; then die "codex is in an image that is not to have it"; fi
inside sh -c 'touch ~/.gemini/x ~/.codex/x ~/.local/x ~/.qwen/x' || die "an agent's own folder can't be written"
dc up -d --force-recreate clawdforge >"$work/up" 2>&1
up
inside sh -c 'rm ~/.gemini/x ~/.codex/x ~/.local/x ~/.qwen/x' || die "an agent's own folder is lost with the container"
ok "each agent's own folder outlives the container"
dc down --volumes --timeout 5 >"$work/down" 2>&1
if dc build --build-arg AGENTS=claude,nobody clawdforge >"$work/build" 2>&1; then die "an unknown agent is built"; fi
grep -q 'there is no agent "nobody"' "$work/build" || die "an unknown agent: $(tail -5 "$work/build")"
ok "an agent that there is none of stops the build with one sentence"

printf '\nAll %d checks passed:\n' ${#checked[@]}
printf '  - %s\n' "${checked[@]}"
