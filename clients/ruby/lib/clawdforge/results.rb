# frozen_string_literal: true

module Clawdforge
  # How the results are made of the server's answers: keys that they don't know are ignored.
  module FromAnswer
    # @api private
    def from(answer)
      new(**members.to_h { |member| [member, answer[member.to_s]] })
    end
  end
  private_constant :FromAnswer

  # What a run gave.
  #
  # @!attribute ok [Boolean] true
  # @!attribute result [Hash, Array, String] the parsed value where the whole reply is a JSON object or array, the
  #   reply's text otherwise
  # @!attribute duration_ms [Integer] milliseconds
  # @!attribute stop_reason [String] such as "end_turn"
  RunResult = Struct.new(:ok, :result, :duration_ms, :stop_reason, keyword_init: true) { extend FromAnswer }

  # A run, as far as it has come. What is not known yet is nil.
  #
  # @!attribute run_id [String]
  # @!attribute status [String] "queued", "running", "succeeded", "failed", "timed_out", "cancelled", or "interrupted" by the
  #   server's end
  # @!attribute model [String, nil] nil where another agent than claude chose its own
  # @!attribute queued_at [Integer, nil] Unix seconds
  # @!attribute started_at [Integer, nil] Unix seconds
  # @!attribute finished_at [Integer, nil] Unix seconds
  # @!attribute duration_ms [Integer, nil] milliseconds, without the time in the queue
  # @!attribute result [Object, nil] as in a {RunResult}
  # @!attribute error [String, nil] what went wrong, in words
  # @!attribute stop_reason [String, nil]
  # @!attribute input_tokens [Integer, nil]
  # @!attribute output_tokens [Integer, nil]
  # @!attribute cost_usd [Float, nil]
  # @!attribute agent [String]
  RunState = Struct.new(:run_id, :status, :model, :queued_at, :started_at, :finished_at, :duration_ms, :result, :error,
                        :stop_reason, :input_tokens, :output_tokens, :cost_usd, :agent, keyword_init: true) do
    extend FromAnswer

    # @return [Boolean] whether it is over, well or not
    def done?
      !%w[queued running].include?(status)
    end
  end

  # What a run or turn said while it went on.
  #
  # @!attribute id [Integer] counts from 1
  # @!attribute name [String] "text", "thinking", "tool_call", …; "result" is the last, and "gap" says that some are missing
  # @!attribute data [Hash]
  Event = Struct.new(:id, :name, :data, keyword_init: true) do
    # @return [String] what the agent said, where this is a part of it; otherwise empty
    def text
      name == "text" ? data["content"].to_s : ""
    end
  end

  # An upload.
  #
  # @!attribute file_token [String] what +files+ of runs and turns take
  # @!attribute ttl_secs [Integer] seconds until it expires
  # @!attribute size [Integer] bytes
  FileToken = Struct.new(:file_token, :ttl_secs, :size, keyword_init: true) do
    extend FromAnswer

    # @api private
    # @return [Array<String>, nil] what +files+ names, as the server takes it
    def self.list(files)
      files&.map { |file| file.is_a?(self) ? file.file_token : file }
    end
  end

  # An app's token. +inspect+, +to_s+ and +pp+ hide the token itself.
  #
  # @!attribute name [String]
  # @!attribute token [String, nil] the bearer; nil in a list, for the server shows it only once
  # @!attribute ip_cidrs [Array<String>] the networks that it may be used from; empty for any
  # @!attribute created_at [Integer] Unix seconds
  # @!attribute last_used [Integer, nil] Unix seconds; nil where it was just created or never used
  # @!attribute enabled [Boolean] false once it is revoked
  AppToken = Struct.new(:name, :token, :ip_cidrs, :created_at, :last_used, :enabled, :webhook_secret, keyword_init: true) do
    extend FromAnswer

    # The server gives a list when it mints a token, and one comma-joined string when it lists them.
    def self.from(answer)
      super(answer.merge("ip_cidrs" => Array(answer["ip_cidrs"]).flat_map { |cidrs| cidrs.split(",") }))
    end

    def inspect
      shown = to_h.map { |member, value| "#{member}=#{member == :token && value ? "[hidden]" : value.inspect}" }
      "#<struct #{self.class} #{shown.join(", ")}>"
    end
    alias_method :to_s, :inspect

    def pretty_print(printer)
      printer.text(inspect)
    end
  end

  # One message of the agent in a turn.
  #
  # @!attribute type [String] "text", "thinking", "tool_call", "stop", "error", …
  # @!attribute content [String, nil] of text, thinking and errors
  # @!attribute name [String, nil] the tool's name
  # @!attribute args [Object, nil] what the tool was called with
  # @!attribute result [Object, nil] what the tool gave
  TurnEvent = Struct.new(:type, :content, :name, :args, :result, keyword_init: true) { extend FromAnswer }

  # What a turn gave.
  #
  # @!attribute ok [Boolean] true
  # @!attribute session_id [String]
  # @!attribute turn_index [Integer] counts the session's completed turns from 1
  # @!attribute events [Array<TurnEvent>]
  # @!attribute stop_reason [String] such as "end_turn"
  # @!attribute duration_ms [Integer] milliseconds
  # @!attribute files [Array<String>] the names that the turn's files have in the session's folder, where they stay
  TurnResult = Struct.new(:ok, :session_id, :turn_index, :events, :stop_reason, :duration_ms, :files, keyword_init: true) do
    extend FromAnswer

    def self.from(answer)
      super(answer.merge("events" => Array(answer["events"]).map { |event| TurnEvent.from(event) }, "files" => Array(answer["files"])))
    end

    # @return [String] the agent's reply: the content of the events of type "text", joined
    def text
      events.select { |event| event.type == "text" }.map(&:content).join
    end
  end

  # A session as the server has it.
  #
  # @!attribute session_id [String]
  # @!attribute agent [String]
  # @!attribute model [String, nil]
  # @!attribute cwd [String] its folder on the server
  # @!attribute created_at [Integer] Unix seconds
  # @!attribute last_turn_at [Integer, nil] Unix seconds
  # @!attribute turn_count [Integer]
  # @!attribute closed_at [Integer, nil] Unix seconds
  # @!attribute live [Boolean] whether a turn could be sent
  # @!attribute meta [Hash, nil] the app's own object
  SessionState = Struct.new(:session_id, :agent, :model, :cwd, :created_at, :last_turn_at, :turn_count, :closed_at,
                            :live, :meta, keyword_init: true) { extend FromAnswer }
end
