#!/usr/bin/env bash
# Have this node's local SSD at /nvme, for what is offloaded there (engine.nvme_path=/nvme). Does
# nothing where there is none, or where it was done before. With several SSDs the first one is taken.
set -euo pipefail

if mountpoint -q /nvme || [ -L /nvme ]; then
    exit
fi
mounted=/opt/dlami/nvme # by AWS's deep learning images
if mountpoint -q "$mounted"; then
    sudo chmod 1777 "$mounted"
    sudo ln -s "$mounted" /nvme
    exit
fi
disk=$(find /dev/disk/by-id/ \
    \( -name 'nvme-Amazon_EC2_NVMe_Instance_Storage_*' -o -name 'google-local-nvme-ssd-*' \) \
    2> /dev/null | sort | head -n 1)
if [ -z "$disk" ]; then
    echo "no local SSD"
    exit
fi
# It is empty after each start of the machine, and not after a reboot.
sudo blkid "$disk" > /dev/null || sudo mkfs.ext4 -q "$disk"
sudo mkdir -p /nvme
sudo mount -o noatime "$disk" /nvme
sudo chmod 1777 /nvme
