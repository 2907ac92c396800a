"""`python -m ringfence.record`: the recorder process."""

import sys

from ringfence.record.process import main

sys.exit(main(sys.argv[1:]))
