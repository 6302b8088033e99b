#!/usr/bin/env bash
# In the machine that run.sh makes: installs the service as docs/operations.md says, and has the real claude try what it should not be able to.
exec >/opt/tests/told 2>&1
set -u
home=/var/lib/clawdforge/home
wrong() { echo "WRONG: $*"; }

ip link set lo up
useradd --system --home-dir $home --shell /usr/sbin/nologin clawdforge
mkdir -p /etc/clawdforge $home/.claude $home/.ssh $home/.config/fish $home/project/.git/hooks /tmp/victim /run/near
setpriv --reuid=nobody --regid=nogroup --clear-groups env HOME=/tmp clawdforge demo --model-only >/run/stub 2>&1 &
until grep -q ANTHROPIC_BASE_URL /run/stub; do sleep 0.2; done
url=$(grep -om1 'http://127.0.0.1:[0-9]*' /run/stub)
cat >/etc/clawdforge/env <<SETTINGS
CLAWDFORGE_ADMIN_TOKEN=an-admin-token-for-tests
CLAWDFORGE_SANDBOX=required
CLAWDFORGE_STANDBY=0
CLAWDFORGE_AGENT_MEMORY_MB=1500
CLAWDFORGE_AGENT_PROCESSES=400
ANTHROPIC_BASE_URL=$url
CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1
SETTINGS
chmod 600 /etc/clawdforge/env
echo '{"permissions": {"allow": ["Bash"]}}' >$home/.claude/settings.json
echo '{"claudeAiOauth": {"accessToken": "a", "refreshToken": "refresh-of-the-user", "expiresAt": 9999999999999, "scopes": ["user:inference"]}}' \
    >$home/.claude/.credentials.json
for file in .bashrc .profile .config/fish/config.fish .gitconfig .git-credentials .ssh/id_ed25519 .ssh/authorized_keys project/.git/hooks/pre-commit; do
    echo "# of-the-user" >"$home/$file"
done
chown -R clawdforge:clawdforge /var/lib/clawdforge
echo of-another-app >/tmp/victim/file
python3 -m http.server --bind 127.0.0.1 --directory /run/near 8123 >/dev/null 2>&1 &
systemctl daemon-reload
systemctl start clawdforge
until curl -sf -m 2 http://127.0.0.1:8800/healthz >/dev/null; do sleep 0.5; done
journalctl --unit clawdforge --no-pager --output cat | grep -i -e "not shut" -e "no control groups" && wrong "the service has not all of its fences"

mint() { curl -s -H 'Authorization: Bearer an-admin-token-for-tests' --json "$1" http://127.0.0.1:8800/admin/tokens | grep -o 'cf_[0-9a-f]*'; }
field() { python3 -c 'import json, sys; print(json.load(sys.stdin).get(sys.argv[1], ""))' "$1"; }
post() { curl -s -m 600 -H "Authorization: Bearer $1" --json @- "http://127.0.0.1:8800$2"; }
upload() { curl -s -H "Authorization: Bearer $1" -F "file=@/opt/tests/attacks/$2" http://127.0.0.1:8800/files | field file_token; }
# TOKEN COMMAND FILE…: what a run of it answers.
run() {
    python3 -c 'import json, sys
tool = {"name": "Bash", "input": {"command": sys.argv[1], "description": "test", "timeout": 300000}}
print(json.dumps({"prompt": "stub: " + json.dumps({"tool": tool}), "files": sys.argv[2:], "timeout_secs": 400}))' "${@:2}" | post "$1" /run
}

app=$(mint '{"name": "app"}')
bound=$(mint '{"name": "bound", "network": "model"}') || wrong "the service can't bind an app in what it reaches"
other=$(mint '{"name": "other"}')
session=$(echo '{}' | post "$other" /sessions)
victim=$(echo "$session" | field cwd)
echo the-diary >"$victim/diary.txt"
echo '{"prompt": "quince-prompt"}' | post "$other" "/sessions/$(echo "$session" | field session_id)/turn" >/dev/null
variables="export DATA=/var/lib/clawdforge/data USER_HOME=$home SERVER=$(systemctl show --property MainPID --value clawdforge) ADDRESS=127.0.0.1:8800"
variables="$variables OTHER=$victim OTHER_AGENT=$(pgrep -u clawdforge -f input-format | head -n 1) SHARED=/tmp/victim NEAR=127.0.0.1:8123"

for file in /opt/tests/attacks/*.sh; do
    name=$(basename "$file" .sh)
    token=$app
    case $name in
    # Hogs come below; for signals Debian's kernel is too old.
    lib | disk | memory | signals) continue ;;
    network) token=$bound ;;
    esac
    answer=$(run "$token" "$variables; bash $name.sh" "$(upload "$token" lib.sh)" "$(upload "$token" "$name.sh")")
    echo "$name:"
    echo "$answer" | field result | cut -c 1-300 | grep -e '^held' -e '^kept' -e '^REACHED' -e '^LOST' || wrong "$answer"
done

# Where there are control groups a hog hurts itself alone.
cgroup=/sys/fs/cgroup/system.slice/clawdforge.service
run "$app" 'f() { f | f & f; }; f; sleep 20' >/run/bomb &
bomb=$!
sleep 15
held=$(cat $cgroup/agent-*/pids.current | sort -n | tail -n 1)
echo "a fork bomb holds $held processes"
[ "$held" -le 400 ] || wrong "it was not held"
[ "$(run "$other" 'echo neighbour' | field result)" = neighbour ] || wrong "another's run did not go on beside it"
wait $bomb
run "$app" 'python3 -c "x = [bytes(10**6) for _ in range(10**5)]"; echo survived' | field error | tee /run/hog
grep -q "more than 1500 MiB of memory" /run/hog || wrong "a hog of memory was not ended, or not told why"
groups() { find $cgroup -maxdepth 1 -name 'agent-*' | wc -l; }
for _ in $(seq 60); do [ "$(groups)" -gt 1 ] || break; sleep 1; done
echo "control groups that are left, the session's among them: $(groups)"
[ "$(groups)" -le 1 ] || wrong "$(ls -d $cgroup/agent-*) are left; $(ls /var/lib/clawdforge/data/runs /var/lib/clawdforge/data/sessions)"
systemctl stop clawdforge
pgrep -u clawdforge && wrong "processes were left"
echo "all of it was tried"
