# frozen_string_literal: true

# Uploads a file, this one where none is named, and asks for its sum.

require "clawdforge"

client = Clawdforge::Client.new(base_url: ENV.fetch("CLAWDFORGE_URL"), token: ENV.fetch("CLAWDFORGE_TOKEN"))
file = client.upload_file(ARGV.first || __FILE__, ttl_secs: 600)
puts "#{file.size} bytes, kept for #{file.ttl_secs} s"
puts client.run(prompt: "Sum the file up in one sentence.", files: [file]).result
