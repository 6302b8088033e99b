# frozen_string_literal: true

require "json"

module Clawdforge
  # How far a batch has come. +status+ is +running+, +paused+ (until midnight UTC, the budget is spent), +cancelling+, +cancelled+ or +finished+;
  # +counts+ has the runs by their status; times are Unix seconds.
  Batch = Struct.new(:batch_id, :status, :total, :counts, :created_at, :cancelled_at, :finished_at, :estimated_end_at, :paused_until,
                     :webhook, keyword_init: true) do
    extend FromAnswer

    # @return [Boolean] whether all of it has ended
    def done?
      !finished_at.nil?
    end
  end

  # What came of a run of a batch: +answer+ is what {Client#run} would have been answered, a Hash with +ok+, and +result+ or +error+.
  BatchResult = Struct.new(:seq, :custom_id, :run_id, :status, :answer, keyword_init: true) do
    extend FromAnswer
  end

  # Many runs at once, by way of {Client#batches}.
  class Batches
    # @api private
    def initialize(http)
      @http = http
    end

    # Has many runs made, where nobody else wants the place. Where one is wrong, none is made: status 422 names it by its number.
    #
    # @param runs [Enumerable<Hash>] up to 10,000, each as +POST /run+ takes it (+prompt+ and what else), with a +custom_id+ of one's own
    # @param webhook [String, nil] who is told of its end
    # @return [Batch]
    # @raise [AuthError, APIError, TransportError]
    def create(runs, webhook: nil)
      Batch.from(@http.call(Net::HTTP::Post, "/batches", json: { runs: runs.to_a, webhook: webhook }))
    end

    # @return [Batch] how far it has come
    # @raise (see #create)
    def get(batch_id)
      Batch.from(@http.call(Net::HTTP::Get, path(batch_id)))
    end

    # @return [Array<Batch>] the newest 50
    # @raise (see #create)
    def list
      @http.call(Net::HTTP::Get, "/batches").fetch("batches", []).map { |batch| Batch.from(batch) }
    end

    # Cancels what waits of it and what goes on.
    #
    # @return [Batch] when it is over
    # @raise (see #create)
    def cancel(batch_id)
      Batch.from(@http.call(Net::HTTP::Delete, path(batch_id)))
    end

    # What came of the runs that have ended, in the order in which they did.
    #
    # @param after [Integer] the +seq+ of one: only those behind it
    # @yieldparam result [BatchResult]
    # @return [Enumerator<BatchResult>] without a block
    # @raise (see #create)
    def results(batch_id, after: 0, &block)
      return to_enum(:results, batch_id, after: after) unless block

      @http.stream(Net::HTTP::Get, "#{path(batch_id)}/results?after=#{Integer(after)}") do |response|
        rest = +""
        response.read_body do |piece|
          rest << piece
          while (line = rest.slice!(/\A[^\n]*\n/n))
            block.call(BatchResult.from(JSON.parse(line.force_encoding(Encoding::UTF_8))))
          end
        end
      end
    end

    private

    def path(batch_id)
      "/batches/#{HTTP.segment("batch_id", batch_id)}"
    end
  end
end
