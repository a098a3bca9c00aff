#!/usr/bin/env bash
# Tell Ray when the cloud announces that it takes this spot machine back: no new work comes here, and a
# training saves (docs/reliability.md). Asks every 5 seconds; on other machines there is never a notice.
#
#   spot-notice.sh aws|gcp RAY_ADDRESS
set -euo pipefail
cloud=$1
address=$2
metadata=${SPOT_METADATA:-http://169.254.169.254}
exec 9> "/tmp/spot-notice-$UID.lock"
flock -n 9 || exit 0 # another one asks already

ask() { curl -sf --max-time 5 "$@"; }

# Each prints how many seconds are left, or fails as long as there is no notice.
aws() { # a notice comes two minutes ahead
    local token gone
    token=$(ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$metadata/latest/api/token") &&
        gone=$(ask -H "X-aws-ec2-metadata-token: $token" "$metadata/latest/meta-data/spot/instance-action" |
            sed -n 's/.*"time": *"\([^"]*\)".*/\1/p') &&
        [ -n "$gone" ] && echo $(($(date -d "$gone" +%s) - $(date +%s)))
}
gcp() { # half a minute ahead
    ask -H 'Metadata-Flavor: Google' "$metadata/computeMetadata/v1/instance/preempted" | grep -q TRUE &&
        echo 30
}

until seconds=$("$cloud"); do
    sleep 5
done
# Ray's command takes the node for its own that it would connect to, which may be another.
node=$(python - "$address" << 'END'
import sys
import psutil
from ray._raylet import GcsClient

mine = {one.address for card in psutil.net_if_addrs().values() for one in card}
for node in GcsClient(address=sys.argv[1]).get_all_node_info().values():
    if node.node_manager_address in mine and node.state == 0:  # alive
        print(node.node_id.hex())
END
)
ray drain-node --address="$address" --node-id="$node" --reason=DRAIN_NODE_REASON_PREEMPTION \
    --reason-message='spot notice' --deadline-remaining-seconds="$((seconds > 0 ? seconds : 0))"
