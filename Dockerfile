# The whole service in one image. compose.yml runs it; docs/operations.md is the operator's guide.

FROM rust:1.95-bookworm AS server
WORKDIR /build
# The dependencies, apart from the sources: they stay in the cache until Cargo.lock changes. The manifest names files that
# must be there for cargo to read it.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
    && sed -n 's/^name = "\(.*\)"/benches\/\1.rs/p' Cargo.toml > /tmp/benches \
    && xargs --arg-file /tmp/benches touch src/lib.rs \
    && echo 'fn main() {}' > src/main.rs \
    && cargo build --release --locked
COPY npm npm
COPY src src
# What was built of the empty sources is newer than these files.
RUN touch src/lib.rs src/main.rs && cargo build --release --locked

FROM node:22-bookworm-slim AS clis
# Not `npm ci`: it refuses a lockfile that lacks optional packages which were never published, and acpx names such.
WORKDIR /opt/claude
COPY npm/claude .
# claude's installer links the platform's binary to the name that is called; the package that it came in can go.
RUN npm install --no-save --ignore-scripts --no-audit --no-fund \
    && node node_modules/@anthropic-ai/claude-code/install.cjs \
    && rm -r node_modules/@anthropic-ai/claude-code-linux-*
WORKDIR /opt/acpx
COPY npm/acpx .
# What is optional here is a second copy of the claude binary.
RUN npm install --no-save --ignore-scripts --no-audit --no-fund --omit=optional
# The agents that are in beside claude: some of codex, gemini, opencode, qwen, by commas or spaces.
ARG AGENTS=claude
WORKDIR /opt/agents
COPY npm .
RUN ./agents.sh "$AGENTS"

FROM node:22-bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates tini \
    && rm -rf /var/lib/apt/lists/*
# The user that owns bind mounts on the host; named volumes take the owner over from here.
ARG UID=1000 GID=1000
RUN if [ "$UID" = 0 ]; then echo "CLAWDFORGE_UID is 0: agents must not be root; name an ordinary user's" >&2; exit 1; fi \
    && userdel --remove node \
    && groupadd --non-unique --gid "$GID" clawdforge \
    && useradd --no-log-init --uid "$UID" --gid "$GID" --create-home --shell /bin/bash clawdforge \
    && for folder in .claude .codex .gemini .local .qwen; do \
        install -d -m 0700 -o "$UID" -g "$GID" "/home/clawdforge/$folder"; \
    done \
    && install -d -m 0700 -o "$UID" -g "$GID" /data
COPY --from=clis /opt/claude /opt/claude
COPY --from=clis /opt/acpx /opt/acpx
COPY --from=clis /opt/agents /opt/agents
COPY --from=server /build/target/release/clawdforge /usr/local/bin/clawdforge

# All of claude's own files in one folder, ~/.claude.json too. The versions are pinned, so nothing updates itself; and what
# is no answer stays at home, where it would pile up whenever it can't be sent.
ENV PATH=/opt/claude/node_modules/.bin:/opt/acpx/node_modules/.bin:/opt/agents/bin:$PATH \
    HOME=/home/clawdforge \
    CLAUDE_CONFIG_DIR=/home/clawdforge/.claude \
    DISABLE_AUTOUPDATER=1 \
    CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 \
    CLAWDFORGE_BIND=0.0.0.0:8800 \
    CLAWDFORGE_DATA_DIR=/data
USER $UID:$GID
WORKDIR /home/clawdforge
VOLUME ["/data", "/home/clawdforge/.claude", "/home/clawdforge/.codex", "/home/clawdforge/.gemini", "/home/clawdforge/.local", "/home/clawdforge/.qwen"]
EXPOSE 8800
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=10s --retries=3 CMD ["clawdforge", "healthcheck"]
ENTRYPOINT ["tini", "--", "clawdforge"]
CMD ["serve"]
