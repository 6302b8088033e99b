# The server itself, which an agent reaches where its token leaves the network open.
. ./lib.sh
attempt "mint a token" 'curl -sf -m 5 "http://$ADDRESS/admin/tokens" -H "Content-Type: application/json" -d "{\"name\":\"planted\"}"'
attempt "list the tokens" 'curl -sf -m 5 "http://$ADDRESS/admin/tokens" -H "Authorization: Bearer cf_0000"'
attempt "run without a token" 'curl -sf -m 5 "http://$ADDRESS/run" -H "Content-Type: application/json" -d "{\"prompt\":\"x\"}"'
attempt "mint one with its own program" '"/proc/$SERVER/exe" token create planted --data-dir "$DATA" || clawdforge token create planted --data-dir "$DATA"'
