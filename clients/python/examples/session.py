"""A conversation. Needs CLAWDFORGE_URL and CLAWDFORGE_TOKEN."""

import os

from clawdforge import Forge

with Forge(base_url=os.environ["CLAWDFORGE_URL"], token=os.environ["CLAWDFORGE_TOKEN"]) as forge:
    with forge.session(meta={"for": "supper"}) as session:
        print(session.turn("My name is Mio.").text())
        turn = session.turn("What is my name?")
        print(turn.text(), f"(turn {turn.turn_index}, {len(turn.events)} events)")
    print("closed at", session.state()["closed_at"])
