#!/usr/bin/env bash
# Bring deploy/on-premise.yaml up on this machine alone, run a command beside it, and take it down.
#
#   sudo deploy/try-on-premise.sh                          teasr submit doctor
#   sudo deploy/try-on-premise.sh bash                     look around; `exit` takes it down
#
# A head and two workers: each an sshd with an address, processes, /root, /tmp and /dev/shm of its own, and
# with its own changes to .venv, into which the wheel is installed. They share the machine's other files. The
# command finds the cluster's dashboard, its token, and in $SHARED a folder that all nodes see.
# `ip link set teasr-try-plug down` (`up`) pulls the cable between this side and the nodes.
#
# Needs root, sshd, rsync, iproute2, the network 10.77.0.0/24, port 28265, and the environment of the project.
set -euo pipefail

project=$(cd "$(dirname "$0")/.." && pwd)
venv=${VENV:-$project/.venv}
python_home=$("$venv/bin/python" -c 'import sys; print(sys.base_prefix)')
export PATH="$venv/bin:$PATH" RAY_USAGE_STATS_ENABLED=0

exec 9> /run/teasr-try.lock
flock -n 9 || { echo "Another $(basename "$0") is running." >&2; exit 75; }

remove_links() {
    for number in 1 2 3; do
        ip link del "teasr-try-end$number" 2> /dev/null || true # else it goes a while after its namespace
        ip netns del "teasr-try-$number" 2> /dev/null || true
    done
    ip link del teasr-try-here 2> /dev/null || true
    ip link del teasr-try 2> /dev/null || true
}

# shellcheck disable=SC2329 # by the trap
clean_up() {
    trap '' INT TERM HUP
    # shellcheck disable=SC2046 # one word for each process
    kill $(ps -o pid= --ppid $$) 2> /dev/null || true
    kill -KILL "${machines[@]}" 2> /dev/null || true # and all that runs on them
    wait 2> /dev/null
    remove_links
    rm -rf "$work"
}

remove_links # of a run that was killed; its processes went with it
machines=()
work=$(mktemp -d /var/tmp/teasr-try.XXXXXX)
trap clean_up EXIT
mkdir "$work/shared"
ssh-keygen -q -t ed25519 -N '' -f "$work/key"
ssh-keygen -q -t ed25519 -N '' -f "$work/hostkey"
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$work/token")

# ---- three machines and the network between them -----------------------------------------------------
ip link add teasr-try type bridge
ip link set teasr-try up
ip link add teasr-try-here type veth peer name teasr-try-plug
ip address add 10.77.0.254/24 dev teasr-try-here
ip link set teasr-try-here up
ip link set teasr-try-plug master teasr-try up

machine() { # number: runs until it is killed
    node=$work/$1 space=teasr-try-$1
    mkdir -p "$node"/{root/.ssh,tmp,venv,changes}
    cp "$work/key.pub" "$node/root/.ssh/authorized_keys"
    ln -s "$venv" "$node/root/venv"
    touch "$node/root/.bashrc"
    if [ -d ~/.cache/torch_extensions ]; then # compiled here before: a minute for each machine
        mkdir "$node/root/.cache"
        cp -a ~/.cache/torch_extensions "$node/root/.cache/"
    fi
    sed "/^127.0.1.1/d; \$a 127.0.1.1 $space" /etc/hosts > "$node/hosts"
    export node space venv python_home work
    # shellcheck disable=SC2016 # the inner shell expands
    exec setpriv --pdeathsig KILL ip netns exec "$space" \
        unshare --pid --mount --uts --fork --kill-child --mount-proc bash -euc '
            hostname "$space"
            mount -t overlay -o "lowerdir=$venv,upperdir=$node/changes,workdir=$node/venv" overlay "$venv"
            for path in "$venv" "$python_home"; do
                case $path in /root/* | /tmp/*)
                    mkdir -p "$node$path"
                    mount --bind "$path" "$node$path" ;;
                esac
            done
            mount --rbind "$node/root" /root
            mount --rbind "$node/tmp" /tmp
            chmod 1777 /tmp
            mount --bind "$node/hosts" /etc/hosts
            mount -t tmpfs tmpfs /dev/shm
            mount -t tmpfs tmpfs /run
            mkdir /run/sshd
            exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/sbin/sshd -D -e -f /dev/null \
                -h "$work/hostkey" -o PermitRootLogin=prohibit-password -o PidFile=none'
}

for number in 1 2 3; do
    ip netns add "teasr-try-$number"
    ip link add "teasr-try-end$number" type veth peer name eth0 netns "teasr-try-$number"
    ip link set "teasr-try-end$number" master teasr-try up
    ip -n "teasr-try-$number" address add "10.77.0.$number/24" dev eth0
    ip -n "teasr-try-$number" link set eth0 up
    ip -n "teasr-try-$number" link set lo up
    machine "$number" > "$work/sshd-$number.log" 2>&1 9>&- < /dev/null &
    machines+=($!)
done

# ---- on-premise.yaml, filled in ----------------------------------------------------------------------
python -m pip wheel -q --no-deps -w "$work/dist" "$project"
sed "s|^export MLFLOW_TRACKING_URI=.*|export MLFLOW_TRACKING_URI=sqlite:///$work/shared/mlflow.db|
    s|^export TEASR_HOME=.*|export TEASR_HOME=$work/shared/home|" "$project/deploy/nodes.env" > "$work/nodes.env"
python - "$project" "$work" << 'PYTHON'
import sys
from pathlib import Path

import yaml

project, work = map(Path, sys.argv[1:])
config = yaml.safe_load((project / "deploy" / "on-premise.yaml").read_text())
config["cluster_name"] = work.name
config["provider"] |= {"head_ip": "10.77.0.1", "worker_ips": ["10.77.0.2", "10.77.0.3"]}
config["auth"] = {"ssh_user": "root", "ssh_private_key": str(work / "key")}
made = {"~/.ray/auth_token": work / "token", "deploy/nodes.env": work / "nodes.env"}
config["file_mounts"] = {
    there: str(made.get(here, work / here if here.startswith("dist/") else project / here))
    for there, here in config["file_mounts"].items()
}
(work / "cluster.yaml").write_text(yaml.safe_dump(config))
PYTHON

# ---- up, the command, down ---------------------------------------------------------------------------
launcher() { RAY_TMPDIR=$work ray "$1" -y "${@:2}" "$work/cluster.yaml" 9>&-; }
launcher up --no-config-cache

# As someone at a terminal would: a new tunnel when the old one has died.
# shellcheck disable=SC2016 # the inner shell expands
setpriv --pdeathsig KILL bash -c 'while true; do
    ssh -N -i "$0" -L 28265:127.0.0.1:8265 -o ExitOnForwardFailure=yes -o BatchMode=yes \
        -o ConnectTimeout=5 -o ServerAliveInterval=3 -o ServerAliveCountMax=2 \
        -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@10.77.0.1
    sleep 1
done' "$work/key" > "$work/tunnel.log" 2>&1 9>&- < /dev/null &
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:28265 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$work/token SHARED=$work/shared
alive=0
for _ in $(seq 60); do # the head brings up the workers
    alive=$(ray list nodes --filter state=ALIVE --format json 2> /dev/null | grep -o '"node_ip"' | wc -l || true)
    [ "$alive" -ge 3 ] && break
    sleep 1
done
echo "$alive nodes are alive"
[ "$alive" -ge 3 ] || exit 1
code=0
if [ $# -eq 0 ]; then set -- teasr submit doctor; fi
"$@" 9>&- || code=$?
launcher down
exit "$code"
