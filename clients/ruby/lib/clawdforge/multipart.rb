# frozen_string_literal: true

require "securerandom"
require "stringio"

module Clawdforge
  # A multipart/form-data body of one file, read from its source in pieces while it is sent.
  class Multipart
    # @return [String] the type that names the boundary
    attr_reader :content_type
    # @return [Integer, nil] bytes; nil where the source can't tell
    attr_reader :length

    def initialize(source, filename, content_type)
      raise ArgumentError, "content_type must not contain a line break" if content_type.match?(/[\r\n]/)

      boundary = "clawdforge-#{SecureRandom.hex(16)}"
      @content_type = "multipart/form-data; boundary=#{boundary}"
      head = "--#{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"#{escape(filename)}\"\r\n" \
             "Content-Type: #{content_type.b}\r\n\r\n"
      tail = "\r\n--#{boundary}--\r\n"
      @source = source
      @left = remaining
      @length = @left && head.bytesize + @left + tail.bytesize
      @parts = [StringIO.new(head).method(:read), method(:read_source), StringIO.new(tail).method(:read)]
    end

    # As IO#read, except that a piece may be shorter than +length+ before the end. None is empty: in a chunked body that
    # would be the end.
    def read(length = nil, buffer = +"")
      return buffer.replace(rest) unless length

      until @parts.empty?
        return buffer if @parts.first.call(length, buffer) && !buffer.empty?

        @parts.shift
      end
      buffer.clear
      nil
    end

    private

    # As browsers do.
    def escape(filename)
      filename.b.gsub(/["\r\n]/) { |char| format("%%%02X", char.ord) }
    end

    # Bytes from the source's position to its end, nil where they are unknown: for a pipe, by whichever name it was opened,
    # and where it says 0, as all of /proc does.
    def remaining
      return unless @source.respond_to?(:size) && @source.respond_to?(:pos)
      return if @source.respond_to?(:stat) && !@source.stat.file?

      left = @source.size - @source.pos
      left if left.positive?
    end

    # No more than was promised in the length, though the file may grow meanwhile.
    def read_source(length, buffer)
      return @source.read(length, buffer) unless @left
      return if @left.zero?

      piece = @source.read([length, @left].min, buffer)
      # No EOFError: IO.copy_stream would take it for the end.
      raise IOError, "the file became shorter while it was sent" if piece.nil? || piece.empty?

      @left -= piece.bytesize
      piece
    end

    def rest
      pieces = "".b
      buffer = +""
      pieces << buffer.b while read(1 << 16, buffer)
      pieces
    end
  end
  private_constant :Multipart
end
