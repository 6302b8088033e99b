# frozen_string_literal: true

require_relative "clawdforge/version"
require_relative "clawdforge/errors"
require_relative "clawdforge/results"
require_relative "clawdforge/multipart"
require_relative "clawdforge/http"
require_relative "clawdforge/event_stream"
require_relative "clawdforge/session"
require_relative "clawdforge/batches"
require_relative "clawdforge/webhooks"
require_relative "clawdforge/client"

# A client of clawdforge, the HTTP daemon that runs the claude CLI for the apps on a LAN. Start at {Client}.
module Clawdforge
end
