"""`python -m ringfence`."""

from ringfence.wiring import main

main()
