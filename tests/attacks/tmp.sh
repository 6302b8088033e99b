# The folders that all programs share.
. ./lib.sh
attempt "make a file in /tmp" 'echo x > /tmp/of-an-attack'
attempt "make a folder there" 'mkdir /tmp/acpx-of-an-attack'
attempt "read what others have there" 'cat "$SHARED/file"'
attempt "change it" 'echo x > "$SHARED/file"'
attempt "see what there is" 'ls /tmp /var/tmp'
attempt "put a link where another program will write" 'ln -s "$OTHER" /tmp/link-of-an-attack'
need "a temporary folder of its own" 'echo x > "$TMPDIR/x" && cat "$TMPDIR/x"'
