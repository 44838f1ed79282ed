#!/usr/bin/env bash
# usage: unshare --mount --pid --fork --kill-child --uts --ipc bash machine.sh ROOT NAME ADDRESS PATH...
# Makes the root folder of a machine at ROOT and waits. The system's folders and the PATHs are there to be read; all else
# (home, temporary folder, shared memory, processes) is the machine's own, in memory, and ends with it.
set -euo pipefail
root=$1 name=$2 address=$3
shift 3
mount --make-rprivate /
mount -t tmpfs -o size=2g machine "$root"
for path in /usr /etc /bin /sbin /lib /lib64 /sys "$@"; do
    [[ -e $path && ! -e $root$path ]] || continue
    if [[ -L $path ]]; then
        cp --no-dereference "$path" "$root$path"
    else
        mkdir --parents "$root$path"
        mount --rbind "$path" "$root$path"
        mount -o remount,bind,ro "$root$path"
    fi
done
mkdir --parents "$root"/{proc,dev,tmp,root,run}
mount -t proc proc "$root/proc"
mount -t tmpfs devices "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln --symbolic /proc/self/fd "$root/dev/fd"
mkdir "$root/dev/shm"
mount -t tmpfs -o size=1g memory "$root/dev/shm"
printf '127.0.0.1 localhost\n%s %s\n' "$address" "$name" > "$root/run/hosts"
mount --bind "$root/run/hosts" "$root/etc/hosts"
# No name server: a name that is not known here is unknown at once.
touch "$root/run/resolv.conf"
mount --bind "$root/run/resolv.conf" "$(realpath "$root/etc/resolv.conf")"
hostname "$name"
touch "$root/run/ready"
exec chroot "$root" sleep infinity
