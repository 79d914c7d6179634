#!/usr/bin/env bash
# launch/test.sh [--long] [arguments of pytest]
#
# Run the tests (all of tests/ unless told otherwise), two beside each other; whatever of the set-up is
# missing is done first. Twelve minutes on two cores.
#   --long               also the campaigns: all combinations, every launcher, kill schedules, thousands
#                        of damaged buffers, messages of gigabytes (9 to 12 GiB of memory); an hour
#   PARSIMONY_DRY_RUN=1  print the command only
# Example: launch/test.sh tests/unit -k masking
# Whether the tests find faults: python tests/mutants.py
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

enter
# loadgroup: tests that look at one long run (marked xdist_group) go to one worker, which makes it once.
print_and_exec python -m pytest -n 2 --dist loadgroup "$@"
