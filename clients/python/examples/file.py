"""A file for the agent to read. Needs CLAWDFORGE_URL and CLAWDFORGE_TOKEN."""

import os

from clawdforge import Forge, ForgeAPIError

with Forge(base_url=os.environ["CLAWDFORGE_URL"], token=os.environ["CLAWDFORGE_TOKEN"]) as forge:
    file = forge.upload_file(__file__, ttl_secs=600)
    print(file.size, "bytes, kept for", file.ttl_secs, "seconds")
    try:
        print(forge.run("Sum the file up.", files=[file.file_token], timeout_secs=300).result)
    except ForgeAPIError as error:
        # 502: claude failed, or its time was up; the message says why.
        print("No answer:", error)
