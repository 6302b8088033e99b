# frozen_string_literal: true

require_relative "test_helper"
require "pathname"
require "tmpdir"

class UploadTest < ClientTest
  ANSWER = { "ok" => true, "file_token" => "ff_1", "ttl_secs" => 60, "size" => 5 }.freeze

  def setup
    super
    @file = Tempfile.new(["notes", ".txt"])
    @file.write("h\xFFll\n")
    @file.flush
    stub_request(:post, /files/).to_return do |request|
      @sent = request
      { body: JSON.generate(ANSWER) }
    end
  end

  def teardown
    @file.close!
    super
  end

  # The one part, taken apart: its header lines and its content.
  def part
    boundary = @sent.headers["Content-Type"][/\Amultipart\/form-data; boundary=(\S+)\z/, 1]
    assert @sent.body.start_with?("--#{boundary}\r\n")
    assert @sent.body.end_with?("\r\n--#{boundary}--\r\n")
    head, content = @sent.body.delete_prefix("--#{boundary}\r\n").delete_suffix("\r\n--#{boundary}--\r\n").split("\r\n\r\n", 2)
    [head.split("\r\n"), content]
  end

  def test_a_path
    token = client.upload_file(@file.path, ttl_secs: 60)
    assert_equal Clawdforge::FileToken.new(file_token: "ff_1", ttl_secs: 60, size: 5), token
    assert_equal "ttl_secs=60", @sent.uri.query
    assert_equal "Bearer #{TOKEN}", @sent.headers["Authorization"]
    assert_equal @sent.body.bytesize.to_s, @sent.headers["Content-Length"]
    headers, content = part
    assert_equal ["Content-Disposition: form-data; name=\"file\"; filename=\"#{File.basename(@file.path)}\"",
                  "Content-Type: application/octet-stream"], headers
    assert_equal "h\xFFll\n".b, content
  end

  def test_a_pathname_a_file_and_a_tempfile
    [Pathname.new(@file.path), File.open(@file.path), @file].each do |source|
      @file.rewind
      client.upload_file(source)
      headers, content = part
      assert_includes headers.first, "filename=\"#{File.basename(@file.path)}\""
      assert_equal "h\xFFll\n".b, content
      assert_equal "ttl_secs=3600", @sent.uri.query
    end
    refute_predicate @file, :closed?
  end

  def test_an_io_is_read_from_where_it_stands
    io = StringIO.new("skipped,grüße")
    io.pos = 8
    client.upload_file(io, filename: "g.txt", content_type: "text/plain")
    headers, content = part
    assert_equal ["Content-Disposition: form-data; name=\"file\"; filename=\"g.txt\"", "Content-Type: text/plain"], headers
    assert_equal "grüße".b, content
    assert_equal @sent.body.bytesize.to_s, @sent.headers["Content-Length"]
    refute_predicate io, :closed?
  end

  def test_an_io_of_unknown_size_is_sent_in_chunks
    reader, writer = IO.pipe
    writer.write("piped")
    writer.close
    client.upload_file(reader)
    assert_equal ["chunked", nil], @sent.headers.values_at("Transfer-Encoding", "Content-Length")
    assert_equal "piped", part.last
  ensure
    reader.close
  end

  def test_a_named_pipe_is_sent_in_chunks
    Dir.mktmpdir do |folder|
      File.mkfifo(path = "#{folder}/pipe")
      writing = Thread.new { File.write(path, "piped") }
      client.upload_file(path)
      writing.join
    end
    assert_equal "chunked", @sent.headers["Transfer-Encoding"]
    assert_equal ["filename=\"pipe\"", "piped"], [part.first.first[/filename=.*/], part.last]
  end

  def test_what_says_that_it_is_empty
    client.upload_file("/proc/version")
    assert_equal File.read("/proc/version"), part.last
    client.upload_file("/dev/null")
    assert_equal "", part.last
    client.upload_file(StringIO.new("x").tap { |io| io.pos = 5 })
    assert_equal "", part.last
  end

  def test_a_name_can_not_leave_its_header
    client.upload_file(@file.path, filename: "a\"b\r\nX: ü\\.txt")
    assert_equal "Content-Disposition: form-data; name=\"file\"; filename=\"a%22b%0D%0AX: ü\\.txt\"".b, part.first.first.b
  end

  def test_what_can_not_be_sent_is_refused_before_anything_is_sent
    assert_raises(Errno::ENOENT) { client.upload_file("/nonexistent/file") }
    assert_raises(Errno::EISDIR) { client.upload_file("/tmp") }
    assert_raises(ArgumentError) { client.upload_file(@file.path, content_type: "text/plain\r\nX: 1") }
    assert_not_requested :any, /./
  end

  def test_the_servers_refusal
    stub_request(:post, /files/).to_return(status: 413, body: '{"detail": "Send at most 5 bytes."}')
    error = assert_raises(Clawdforge::APIError) { client.upload_file(@file.path) }
    assert_equal "HTTP 413: Send at most 5 bytes.", error.message
  end
end
