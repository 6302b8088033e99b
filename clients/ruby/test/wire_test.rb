# frozen_string_literal: true

require_relative "test_helper"
require "rbconfig"

# What WebMock can't show: connections, and bodies that are sent in pieces.
class WireTest < ClientTest
  def setup
    super
    WebMock.disable!
    @accepted = Queue.new
    @server = TCPServer.new("127.0.0.1", 0)
  end

  def teardown
    @serving&.kill&.join
    @server.close
    WebMock.enable!
    super
  end

  # Gives the head of each request to the block, which answers on its socket.
  def serve
    @serving = Thread.new do
      loop do
        Thread.new(@server.accept) do |socket|
          @accepted << (head = socket.gets("\r\n\r\n").to_s)
          yield socket, head
        ensure
          socket.close
        end
      end
    end
    @url = "http://127.0.0.1:#{@server.addr[1]}"
  end

  def reply(socket, body, length: body.bytesize)
    socket.write("HTTP/1.1 200 OK\r\nContent-Length: #{length}\r\n\r\n#{body}")
  end

  def wire_client(**options)
    client(base_url: @url, **options)
  end

  def test_nothing_is_retried
    serve { |socket, head| reply(socket, '{"session_id": "abc"}') if head.start_with?("POST /sessions ") }
    made = wire_client
    session = made.session
    calls = [-> { made.healthz }, -> { made.list_tokens }, -> { made.run(prompt: "hi") }, -> { session.close }]
    calls.each { |call| assert_raises(Clawdforge::TransportError, &call) }
    assert_equal 1 + calls.size, @accepted.size
  end

  def test_an_answer_that_takes_too_long
    serve { sleep }
    error = assert_raises(Clawdforge::TransportError) { wire_client(default_timeout: 0.1, http_timeout_margin: 0.1).run(prompt: "hi") }
    assert_instance_of Net::ReadTimeout, error.cause
    assert_equal 1, @accepted.size
  end

  def test_an_answer_that_is_cut_short
    ['{"ok": true}', '{"ok": tr', ""].each do |body|
      serve { |socket, _| reply(socket, body, length: 20) }
      error = assert_raises(Clawdforge::TransportError) { wire_client.healthz }
      assert_instance_of EOFError, error.cause
      @serving.kill.join
    end
  end

  def test_a_server_that_is_not_there
    serve { flunk }
    @serving.kill.join
    @server.close
    error = assert_raises(Clawdforge::TransportError) { wire_client.healthz }
    assert_instance_of Errno::ECONNREFUSED, error.cause
  end

  def test_a_server_that_speaks_something_else
    serve { |socket, _| socket.write("SSH-2.0-OpenSSH\r\n") }
    error = assert_raises(Clawdforge::TransportError) { wire_client.healthz }
    assert_instance_of Net::HTTPBadResponse, error.cause
  end

  def test_a_server_without_tls
    @url = "https://127.0.0.1:#{@server.addr[1]}"
    @serving = Thread.new { @server.accept.tap { |socket| socket.write("HTTP/1.1 400 Bad Request\r\n\r\n") }.close }
    error = assert_raises(Clawdforge::TransportError) { wire_client.healthz }
    assert_includes [OpenSSL::SSL::SSLError, Errno::ECONNRESET], error.cause.class
  end

  def test_many_threads_share_a_client
    serve do |socket, head|
      body = socket.read(head[/^Content-Length: (\d+)/i, 1].to_i)
      reply(socket, JSON.generate("ok" => true, "result" => JSON.parse(body)["prompt"]))
    end
    made = wire_client
    threads = Array.new(8) { |i| Thread.new { Array.new(5) { |j| made.run(prompt: "#{i}.#{j}").result } } }
    assert_equal Array.new(8) { |i| Array.new(5) { |j| "#{i}.#{j}" } }, threads.map(&:value)
  end

  def test_a_pipe_is_sent_in_chunks
    serve do |socket, head|
      body = +""
      while (size = socket.gets("\r\n").to_i(16)).positive?
        body << socket.read(size + 2).chomp("\r\n")
      end
      reply(socket, JSON.generate("file_token" => "#{head[/^Transfer-Encoding: .*\r$/i]}#{body.bytesize}"))
    end
    reader, writer = IO.pipe
    thread = Thread.new { 10.times { writer.write("x" * 5000) }.tap { writer.close } }
    size = Integer(wire_client.upload_file(reader).file_token[/\ATransfer-Encoding: chunked\r(\d+)\z/i, 1])
    assert_operator size, :>, 50_000
    assert_operator size, :<, 51_000
  ensure
    thread.join
  end

  # Its peak is measured in a process of its own.
  def test_a_large_file_is_never_whole_in_memory
    size = 256 << 20
    received = 0
    serve do |socket, head|
      left = head[/^Content-Length: (\d+)/i, 1].to_i
      buffer = +""
      left -= socket.readpartial([left, 1 << 20].min, buffer).bytesize while left.positive?
      received = head[/^Content-Length: (\d+)/i, 1].to_i
      reply(socket, '{"file_token": "ff_big"}')
    end
    script = <<~RUBY
      require "clawdforge"
      peak = -> { File.read("/proc/self/status")[/VmHWM:\\s+(\\d+)/, 1].to_i }
      client = Clawdforge::Client.new(base_url: ARGV[0], token: "t")
      client.healthz rescue client
      before = peak.call
      client.upload_file(ARGV[1])
      print peak.call - before
    RUBY
    Tempfile.create("sparse") do |file|
      file.truncate(size)
      grown = IO.popen([RbConfig.ruby, "-w", "-I", File.expand_path("../lib", __dir__), "-e", script, @url, file.path], &:read)
      assert_operator received, :>, size
      assert_operator Integer(grown), :<, 32 << 10, "kilobytes"
    end
  end

  def test_a_file_that_changes_while_it_is_sent
    serve do |socket, head|
      body = socket.read(head[/^Content-Length: (\d+)/i, 1].to_i)
      reply(socket, JSON.generate("file_token" => body[/z*(?=\r\n--)/]))
    end
    assert_equal "zzz", wire_client.upload_file(Changing.new(3, "z" * 1000)).file_token
    error = assert_raises(Clawdforge::TransportError) { wire_client.upload_file(Changing.new(2000, "z" * 1000)) }
    assert_match(/shorter/, error.message)
  end

  # Says that it has so many bytes and has others.
  class Changing < StringIO
    attr_reader :size

    def initialize(size, content)
      super(content)
      @size = size
    end
  end
end
