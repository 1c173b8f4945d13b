"""`TRITON_INTERPRET=1 python -m support.docs.pages PAGE` runs the blocks of a page that need Triton's interpreter."""

import sys

from support.docs.blocks import run_interpreted_blocks

from . import PAGES

run_interpreted_blocks(PAGES[sys.argv[1]])
