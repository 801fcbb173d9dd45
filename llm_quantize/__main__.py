"The command, as `python -m llm_quantize`."
import sys

from llm_quantize.cli.main import main

sys.exit(main())
