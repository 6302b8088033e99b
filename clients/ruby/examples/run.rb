# frozen_string_literal: true

# Runs a prompt and prints the reply.

require "clawdforge"

client = Clawdforge::Client.new(base_url: ENV.fetch("CLAWDFORGE_URL"), token: ENV.fetch("CLAWDFORGE_TOKEN"))
begin
  run = client.run(prompt: ARGV.first || "List three colours as a JSON array.", system: "Answer with JSON only.")
  case run.result
  when String then puts run.result
  else puts JSON.pretty_generate(run.result)
  end
  warn "#{run.stop_reason} after #{run.duration_ms} ms"
rescue Clawdforge::Error => e
  abort e.message
end
