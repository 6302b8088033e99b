# frozen_string_literal: true

# Holds a conversation of two turns, and prints the tools that the agent used.

require "clawdforge"

client = Clawdforge::Client.new(base_url: ENV.fetch("CLAWDFORGE_URL"), token: ENV.fetch("CLAWDFORGE_TOKEN"))
client.session(meta: { "for" => "the example" }) do |session|
  ["My name is Mio.", "What is my name?"].each do |prompt|
    turn = session.turn(prompt, timeout_secs: 120)
    turn.events.each { |event| puts "used #{event.name}" if event.type == "tool_call" }
    puts "#{turn.turn_index}: #{turn.text}"
  end
  puts "turns so far: #{session.state.turn_count}"
end
puts "open: #{client.list_sessions(include_closed: false).size}"
