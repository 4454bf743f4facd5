#!/bin/sh
# Run by mmdebstrap with the new root as $1: what makes a plain Debian into the rig's Debian guest.
# Nothing of the boot path is special: kernel, initrd and grub.cfg are as Debian's own tools leave them.
set -eu
root=$1
uuid=$RIG_UUID

echo debian-guest > "$root/etc/hostname"
printf '127.0.0.1 localhost debian-guest\n::1 localhost\n' > "$root/etc/hosts"
printf 'UUID=%s / ext4 errors=remount-ro 0 1\n' "$uuid" > "$root/etc/fstab"
echo 5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f5f > "$root/etc/machine-id"
echo 'root:steadfast' | chroot "$root" chpasswd

# A root shell on the serial line.
mkdir -p "$root/etc/systemd/system/serial-getty@ttyS0.service.d"
cat > "$root/etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf" <<'EOF'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear --keep-baud 115200,57600,38400,9600 %I vt220
EOF

# The address, in this order: rig.ip= on the kernel command line; `address:` in meta-data of a disk labelled CIDATA
# (a NoCloud seed); 10.90.0.N/24 with N the last byte of the MAC address. A seed's user-data that begins with #! is run.
cat > "$root/usr/local/sbin/rig-net" <<'EOF'
#!/bin/sh
# The NIC's driver may still be loading.
for try in $(seq 100); do
    nic=$(ls /sys/class/net | grep -v '^lo$' | head -n 1)
    [ -z "$nic" ] || break
    sleep 0.1
done
[ -n "$nic" ] || exit 0
address=$(sed -n 's/.*\brig\.ip=\([^ ]*\).*/\1/p' /proc/cmdline)
seed=$(blkid -t LABEL=CIDATA -o device 2>/dev/null || blkid -t LABEL=cidata -o device 2>/dev/null || true)
if [ -n "$seed" ]; then
    mkdir -p /run/rig-seed
    mount -o ro "$seed" /run/rig-seed
    [ -n "$address" ] || address=$(sed -n 's/^address: *//p' /run/rig-seed/meta-data)
fi
if [ -z "$address" ]; then
    mac=$(cat "/sys/class/net/$nic/address")
    address=10.90.0.$((0x${mac##*:}))/24
fi
mkdir -p /run/systemd/network
printf '[Match]\nName=%s\n[Network]\nAddress=%s\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n' "$nic" "$address" \
    > /run/systemd/network/10-rig.network
EOF
cat > "$root/usr/local/sbin/rig-seed" <<'EOF'
#!/bin/sh
[ -f /run/rig-seed/user-data ] || exit 0
if [ "$(head -c 2 /run/rig-seed/user-data)" = '#!' ]; then
    cp /run/rig-seed/user-data /run/rig-user-data && chmod 700 /run/rig-user-data && exec /run/rig-user-data
fi
EOF
chmod 755 "$root/usr/local/sbin/rig-net" "$root/usr/local/sbin/rig-seed"
cat > "$root/etc/systemd/system/rig-net.service" <<'EOF'
[Unit]
Description=Address of the first NIC
DefaultDependencies=no
After=systemd-udev-trigger.service local-fs.target
Before=systemd-networkd.service network-pre.target
Wants=network-pre.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/rig-net
[Install]
WantedBy=multi-user.target
EOF
cat > "$root/etc/systemd/system/rig-seed.service" <<'EOF'
[Unit]
Description=User data of the seed disk
After=network.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/rig-seed
[Install]
WantedBy=multi-user.target
EOF
# A web server, and a line on the serial console when all is up.
mkdir -p "$root/srv/www"
echo 'hello from a protected guest' > "$root/srv/www/index.html"
cat > "$root/etc/systemd/system/rig-http.service" <<'EOF'
[Unit]
Description=Small web server on port 80
After=network.target
[Service]
ExecStart=/bin/busybox httpd -f -p 80 -h /srv/www
[Install]
WantedBy=multi-user.target
EOF
cat > "$root/etc/systemd/system/rig-up.service" <<'EOF'
[Unit]
Description=Say that the guest is up
After=redis-server.service rig-http.service systemd-networkd.service
[Service]
Type=oneshot
StandardOutput=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'read up rest < /proc/uptime; echo "RIG-GUEST-UP $up s"'
[Install]
WantedBy=multi-user.target
EOF
chroot "$root" systemctl enable rig-net rig-seed rig-http rig-up systemd-networkd serial-getty@ttyS0 >/dev/null 2>&1
chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer dpkg-db-backup.timer getty@tty1.service getty-static.service systemd-networkd-wait-online.service >/dev/null 2>&1

# A host under software emulation can be fifty times slower than one of metal; nothing shall fail for that alone.
mkdir -p "$root/etc/systemd/system.conf.d" "$root/etc/sysctl.d"
printf '[Manager]\nDefaultTimeoutStartSec=900s\nDefaultDeviceTimeoutSec=900s\n' > "$root/etc/systemd/system.conf.d/slow.conf"
echo 'vm.overcommit_memory = 1' > "$root/etc/sysctl.d/redis.conf"

sed -i -e 's/^bind .*/bind 0.0.0.0/' -e 's/^protected-mode .*/protected-mode no/' -e 's/^appendonly .*/appendonly yes/' \
    "$root/etc/redis/redis.conf"

# grub.cfg by Debian's own generator. It asks grub-probe about the disk below /, which a folder has not: answer for it once.
mkdir -p "$root/etc/default/grub.d"
cat > "$root/etc/default/grub.d/rig.cfg" <<'EOF'
GRUB_TIMEOUT=0
GRUB_TERMINAL=console
GRUB_CMDLINE_LINUX_DEFAULT=""
GRUB_CMDLINE_LINUX="console=ttyS0 net.ifnames=0"
EOF
mv "$root/usr/sbin/grub-probe" "$root/usr/sbin/grub-probe.real"
cat > "$root/usr/sbin/grub-probe" <<EOF
#!/bin/sh
for word; do
    case \$word in
        --target=device|device) echo /dev/vda; exit ;;
        --target=fs_uuid|fs_uuid) echo $uuid; exit ;;
        --target=partuuid|partuuid) exit 1 ;;
        --target=fs|fs) echo ext2; exit ;;
        --target=fs_label|fs_label) echo debian-rig; exit ;;
        --target=abstraction|--target=partmap|abstraction|partmap) exit ;;
        --target=hints_string|--target=compatibility_hint|--target=drive) echo; exit ;;
    esac
done
exit 1
EOF
chmod 755 "$root/usr/sbin/grub-probe"
mkdir -p "$root/boot/grub"
# The generator names the root by UUID only where such a device is seen.
mkdir -p "$root/dev/disk/by-uuid"
: > "$root/dev/disk/by-uuid/$uuid"
chroot "$root" grub-mkconfig -o /boot/grub/grub.cfg
rm -rf "$root/dev/disk"
mv "$root/usr/sbin/grub-probe.real" "$root/usr/sbin/grub-probe"
grep -q "root=UUID=$uuid" "$root/boot/grub/grub.cfg"

rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* \
    "$root"/usr/share/locale/* "$root"/var/log/*.log
