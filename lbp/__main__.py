import sys

from lbp.cli import main

sys.exit(main())
