"""One prompt, one answer. Needs CLAWDFORGE_URL and CLAWDFORGE_TOKEN."""

import os

from clawdforge import Forge

with Forge(base_url=os.environ["CLAWDFORGE_URL"], token=os.environ["CLAWDFORGE_TOKEN"]) as forge:
    run = forge.run("List three colours as a JSON array.", system="Answer with JSON only.")
    print(run.result, f"({run.duration_ms} ms)")
