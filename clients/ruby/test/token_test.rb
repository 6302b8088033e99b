# frozen_string_literal: true

require_relative "test_helper"

class TokenTest < ClientTest
  MINTED = { "name" => "app", "token" => "cf_minted", "ip_cidrs" => ["10.0.0.0/8"], "created_at" => 5 }.freeze

  def test_create_token
    answers(:post, "/admin/tokens", MINTED)
    token = client.create_token("app", ip_cidrs: ["10.0.0.0/8"])
    assert_equal ["app", "cf_minted", ["10.0.0.0/8"], 5, nil, true, nil], token.to_a
    assert_requested :post, "#{URL}/admin/tokens", body: { name: "app", ip_cidrs: ["10.0.0.0/8"] },
                                                   headers: { "Authorization" => "Bearer #{TOKEN}" }
  end

  def test_no_networks_are_not_sent
    answers(:post, "/admin/tokens", MINTED.merge("ip_cidrs" => []))
    assert_equal [], client.create_token("app").ip_cidrs
    client.create_token("app", ip_cidrs: [])
    assert_requested :post, "#{URL}/admin/tokens", body: { name: "app" }, times: 2
  end

  def test_list_tokens_splits_the_networks
    listed = { "created_at" => 5, "last_used" => 9, "enabled" => true }
    answers(:get, "/admin/tokens", { "count" => 2, "tokens" => [
              listed.merge("name" => "a", "ip_cidrs" => "172.24.0.0/16,10.0.0.0/8"), listed.merge("name" => "b", "ip_cidrs" => "")
            ] })
    a, b = client.list_tokens
    assert_equal ["a", nil, ["172.24.0.0/16", "10.0.0.0/8"], 5, 9, true, nil], a.to_a
    assert_equal ["b", []], [b.name, b.ip_cidrs]
  end

  def test_revoke_token
    asked = answers(:delete, "/admin/tokens/my%2Fapp", { "ok" => true, "name" => "my/app" })
    assert_equal true, client.revoke_token("my/app")
    assert_requested asked
  end

  def test_an_empty_name_is_refused_before_anything_is_sent
    ["", nil].each { |name| assert_raises(ArgumentError) { client.revoke_token(name) } }
    assert_not_requested :any, /./
  end

  def test_a_token_is_not_shown
    answers(:post, "/admin/tokens", MINTED)
    token = client.create_token("app")
    refute_includes shown(token), "cf_minted"
    assert_includes token.inspect, 'name="app", token=[hidden], ip_cidrs=["10.0.0.0/8"]'
    assert_equal "cf_minted", token.token
  end
end
