"""`python -m ringfence.egress`: the egress process."""

import sys

from ringfence.egress.process import main

sys.exit(main(sys.argv[1:]))
