# frozen_string_literal: true

module Clawdforge
  VERSION = "0.1.0"
end
