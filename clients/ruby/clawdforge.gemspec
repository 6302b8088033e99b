# frozen_string_literal: true

require_relative "lib/clawdforge/version"

Gem::Specification.new do |spec|
  spec.name = "clawdforge"
  spec.version = Clawdforge::VERSION
  spec.summary = "A client of clawdforge, the HTTP daemon that runs the claude CLI for the apps on a LAN"
  spec.description = "Runs prompts, uploads files, holds sessions of many turns and manages tokens. Standard library only."
  spec.authors = ["The clawdforge authors"]
  spec.license = "MIT"
  spec.required_ruby_version = ">= 3.0"
  # gem build looks for the files from where it stands.
  Dir.chdir(__dir__) unless File.identical?(Dir.pwd, __dir__)
  spec.files = Dir["lib/**/*.rb", "examples/*.rb", "README.md", "LICENSE"]
end
