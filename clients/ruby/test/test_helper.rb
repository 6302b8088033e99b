# frozen_string_literal: true

require "minitest/autorun"
require "webmock/minitest"
require "pp"
require "socket"
require "stringio"
require "tempfile"
require "clawdforge"

class ClientTest < Minitest::Test
  URL = "http://clawdforge.test:8800"
  TOKEN = "cf_0123456789abcdef"

  def client(**options)
    Clawdforge::Client.new(**{ base_url: URL, token: TOKEN }.merge(options))
  end

  # Stubs an answer; without a body to match, whatever is sent gets it.
  def answers(verb, path, answer = {}, status: 200, **request)
    body = answer.is_a?(String) ? answer : JSON.generate(answer)
    stub = stub_request(verb, URL + path)
    stub = stub.with(**request) unless request.empty?
    stub.to_return(status: status, body: body)
  end

  def shown(object)
    [object.inspect, object.to_s, PP.pp(object, +""), PP.pp([object], +""), "#{object}"].join("\n")
  end

  # Everything that a log of the error could hold.
  def logged(error)
    [error.message, error.inspect, error.full_message, PP.pp(error, +"")].join("\n")
  end
end

# Stands in for Net::HTTP and keeps what it was given.
class FakeHTTP
  attr_reader :timeouts, :requests

  def initialize(answer = { "ok" => true })
    @answer = answer
    @timeouts = []
    @requests = []
  end

  def read_timeout=(secs)
    @timeouts << secs
  end

  def request(request)
    @requests << request
    response = Net::HTTPOK.new("1.1", "200", "OK")
    response.instance_variable_set(:@read, true)
    response.body = JSON.generate(@answer)
    response
  end
end
