#!/usr/bin/env bash
# minislurm.sh NODES GPUS_PER_NODE CPUS_PER_NODE
#
# A real Slurm on one machine: munged, slurmctld and a slurmd for each node. A node is a network, host name, process and
# mount namespace of its own, and all of them lie in one outer namespace with a /run in memory: nothing of it is seen on
# the host, and nothing is left there. Takes root, and Debian's slurmctld, slurmd, slurm-client, munge and iproute2.
#
# Says READY on standard output once all nodes are idle, then obeys standard input, a word OK for each line:
#   off 2      cut node2's power, and its network with it: its peers hear nothing more
#   crash 2    end all its processes: its peers' connections are closed
#   on 2       let it come back
# End of input ends everything, so a test runner that is killed takes the cluster along.
set -euo pipefail

if [ -z "${MINISLURM_INSIDE:-}" ]; then
    MINISLURM_INSIDE=1 exec unshare --mount --net --uts --pid --fork --kill-child=KILL --mount-proc bash "$0" "$@"
fi
NODES=$1 GPUS=$2 CPUS=$3 ROOM=/run/slurm

say_why_and_end() { # this shell is process 1 of its namespace: the kernel ends the others with it
    echo "minislurm: $1" >&2
    tail -n 8 "$ROOM"/log/* >&2
    exit 1
}

lay_the_network() {
    local node
    hostname ctl
    echo "127.0.0.1 localhost" > "$ROOM/hosts"
    echo "10.99.0.254 ctl" >> "$ROOM/hosts"
    for node in $(seq "$NODES"); do echo "10.99.0.$node node$node" >> "$ROOM/hosts"; done
    mount --bind "$ROOM/hosts" /etc/hosts
    ip link set lo up
    ip link add switch type bridge
    ip addr add 10.99.0.254/24 dev switch
    ip link set switch up
}

write_config() {
    local gpu gres=
    if [ "$GPUS" -gt 0 ]; then # without a character device behind it a GPU does not count; its digit is the CUDA index
        for gpu in $(seq 0 $((GPUS - 1))); do mknod "$ROOM/dev/nvidia$gpu" c 1 3; done
        echo "NodeName=node[1-$NODES] Name=gpu File=$ROOM/dev/nvidia[0-$((GPUS - 1))]" > "$ROOM/etc/gres.conf"
        gres="Gres=gpu:$GPUS"
    fi
    # Named so that it is not looked for, which fails where /sys/fs/cgroup is not mounted; nothing here uses it.
    echo "CgroupPlugin=cgroup/v1" > "$ROOM/etc/cgroup.conf"
    # cred_expire is also how long a requeued job waits, minutes by default; config_overrides lets a node have more
    # processors than the machine. A job in `main` has 30 s to end when one in `urgent` wants its nodes.
    cat > "$ROOM/etc/slurm.conf" << CONF
ClusterName=mini
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$ROOM/munge.socket,cred_expire=5
StateSaveLocation=$ROOM/state
SlurmdSpoolDir=$ROOM/spool/%n
SlurmctldPidFile=$ROOM/slurmctld.pid
SlurmdPidFile=$ROOM/slurmd-%n.pid
SlurmctldLogFile=$ROOM/log/slurmctld.log
SlurmdLogFile=$ROOM/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MessageTimeout=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${gres:+GresTypes=gpu}
NodeName=node[1-$NODES] CPUs=$CPUS $gres State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF State=UP
CONF
}

power_on() {
    local name=node$1
    ip link del "$name" 2> "$ROOM/log/ip" || true # what a power cut left; its namespace may still be on its way out
    ip netns del "$name" 2> "$ROOM/log/ip" || true
    ip netns add "$name"
    # the same card each time: others remember its address for a while
    ip link add "$name" type veth peer name eth0 address "02:00:00:00:00:$(printf %02x "$1")" netns "$name"
    ip link set "$name" master switch up
    ip -n "$name" link set lo up
    ip -n "$name" addr add "10.99.0.$1/24" dev eth0
    ip -n "$name" link set eth0 up
    # shellcheck disable=SC2016 # $1 is the inner shell's
    ip netns exec "$name" unshare --uts --mount --pid --fork --kill-child=KILL --mount-proc \
        bash -c 'hostname "$1"; slurmd -D & wait' slurmd "$name" > "$ROOM/log/$name.out" 2>&1 < /dev/null &
    echo $! > "$ROOM/$name.pid"
    disown # else this shell would tell of its end
}

crash() { kill -KILL "$(cat "$ROOM/node$1.pid")"; }

power_off() {
    ip link set "node$1" down # first, so that nobody hears of the end of its processes
    crash "$1"
}

all_idle() { [ "$(sinfo --noheader --Node --partition=main --states=idle --format=%N 2> /dev/null | wc -l)" = "$NODES" ]; }

mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p "$ROOM"/{etc,state,spool,log,dev}
export SLURM_CONF=$ROOM/etc/slurm.conf
lay_the_network
write_config

(umask 077 && head -c 128 /dev/urandom > "$ROOM/munge.key")
munged --foreground --key-file="$ROOM/munge.key" --socket="$ROOM/munge.socket" --pid-file="$ROOM/munged.pid" \
    --log-file="$ROOM/log/munged.log" --seed-file="$ROOM/munged.seed" > "$ROOM/log/munged.out" 2>&1 < /dev/null &
for _ in $(seq 500); do
    if munge --socket="$ROOM/munge.socket" --no-input > /dev/null 2>&1; then break; fi
    sleep 0.02
done
slurmctld -D -c > "$ROOM/log/slurmctld.out" 2>&1 < /dev/null &
CONTROLLER=$!
for node in $(seq "$NODES"); do power_on "$node"; done
for _ in $(seq 600); do
    if all_idle; then break; fi
    kill -0 "$CONTROLLER" 2> /dev/null || say_why_and_end "slurmctld has ended"
    sleep 0.05
done
all_idle || say_why_and_end "not all nodes are idle: $(sinfo --noheader --Node --format='%N %t %E')"
echo READY

while read -r command node; do
    case $command in
        off) power_off "$node" ;;
        crash) crash "$node" ;;
        on) power_on "$node" ;;
        *) say_why_and_end "unknown command: $command" ;;
    esac
    echo OK
done
