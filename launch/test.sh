#!/usr/bin/env bash
# launch/test.sh [arguments of pytest]
#
# Run the tests (all of tests/ unless told otherwise); whatever of the set-up is missing is done first.
#   PARSIMONY_DRY_RUN=1  print the command only
#   PARSIMONY_SLOW=1     also what takes gigabytes and minutes (tests/distributed/test_comm.py)
# Example: launch/test.sh tests/unit -k masking
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

enter
print_and_exec python -m pytest "$@"
