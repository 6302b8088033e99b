#!/usr/bin/env bash
# Tries the systemd unit as it is written, by the attacks and by hogs, in a machine of its own: Debian in qemu, with the CLIs and the model stub in it
# and no network. Needs root, debootstrap, qemu-system-x86 and e2fsprogs, and some ten minutes where there is no KVM to be used. Not part of CI for that.
set -euo pipefail
cd "$(dirname "$0")/../.."
mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
accel=${QEMU_ACCEL:-tcg,thread=multi}
cargo build --quiet
target/debug/clawdforge demo --once >/dev/null
folder=$(mktemp -d /var/tmp/clawdforge-machine-XXXXXX)
trap 'rm -rf "$folder"' EXIT
root=$folder/root

debootstrap --variant=minbase --include=systemd,systemd-sysv,udev,dbus,linux-image-cloud-amd64,procps,iproute2,curl,python3,git bookworm "$root" "$mirror" \
    >"$folder/log" 2>&1 || { tail -n 20 "$folder/log" >&2; exit 1; }
node=$(dirname "$(find target/clawdforge-clis/node-* -path '*/bin/node' -type f -print -quit)")
for cli in claude acpx; do cp -a target/clawdforge-clis/$cli-*/ "$root/opt/$cli"; done
install target/debug/clawdforge "$node/node" "$root/usr/local/bin/"
install -m 644 packaging/clawdforge.service "$root/etc/systemd/system/"
install -D -t "$root/opt/tests" tests/systemd/inside.sh
cp -a tests/attacks "$root/opt/tests/"
cat >"$root/etc/systemd/system/tests.service" <<'UNIT'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/opt/tests/inside.sh
ExecStopPost=/usr/bin/systemctl poweroff --force --force
TimeoutStartSec=1800
[Install]
WantedBy=multi-user.target
UNIT
chroot "$root" systemctl --quiet enable tests.service
mke2fs -q -t ext4 -d "$root" "$folder/disk" 4G
timeout 2400 qemu-system-x86_64 -accel "$accel" -cpu max -M q35 -smp 2 -m 6G -nic none -display none -serial "file:$folder/console" -no-reboot \
    -kernel "$root"/boot/vmlinuz-* -initrd "$root"/boot/initrd.img-* -append "root=/dev/vda rw console=ttyS0 panic=1 quiet" \
    -drive "file=$folder/disk,if=virtio,format=raw"
debugfs -R 'cat /opt/tests/told' "$folder/disk" 2>/dev/null | tee "$folder/told"
! grep -q -e '^REACHED' -e '^LOST' -e '^WRONG' "$folder/told" && grep -q '^all of it was tried$' "$folder/told"
