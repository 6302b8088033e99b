//! Addresses: who a caller is on the network, and which networks may call.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net};

/// A list of networks. An IPv4-mapped IPv6 address or network counts as the IPv4 one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks(Vec<IpNet>);

/// A text that is not a network.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an address range such as 192.168.0.0/16 or fd00::/8")]
pub struct NotANetwork(pub String);

impl Networks {
    /// Reads one network per item. A bare address stands for itself alone.
    pub fn parse<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> Result<Self, NotANetwork> {
        items.into_iter().map(|item| parse_network(item.as_ref().trim())).collect::<Result<_, _>>().map(Self)
    }

    /// Whether `address` is inside one of the networks.
    pub fn contain(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.0.iter().any(|network| network.contains(&address))
    }

    /// Whether there is no network at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each network in its canonical form.
    pub fn to_strings(&self) -> Vec<String> {
        self.0.iter().map(ToString::to_string).collect()
    }
}

/// Comma-joined, as the settings and the ledger have it.
impl fmt::Display for Networks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_strings().join(","))
    }
}

/// The comma-joined form; an empty text is no network.
impl FromStr for Networks {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        Self::parse(text.split(',').filter(|item| !item.trim().is_empty()))
    }
}

fn parse_network(text: &str) -> Result<IpNet, NotANetwork> {
    let network =
        text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| NotANetwork(text.to_owned()))?.trunc();
    if let IpNet::V6(v6) = network
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(prefix) = v6.prefix_len().checked_sub(96)
    {
        return Ipv4Net::new(v4, prefix).map(IpNet::V4).map_err(|_| NotANetwork(text.to_owned()));
    }
    Ok(network)
}

/// The address of the caller behind `peer`: the peer itself, unless it is a trusted proxy. Then `forwarded` (the values
/// of `X-Forwarded-For`, in order) is read from the right, past further trusted proxies. `None` where a trusted proxy
/// sent something that is not an address: who calls is then unknown.
pub fn caller_address<'a>(peer: IpAddr, forwarded: impl DoubleEndedIterator<Item = &'a str>, trusted: &Networks) -> Option<IpAddr> {
    let mut caller = peer.to_canonical();
    for hop in forwarded.rev().flat_map(|value| value.rsplit(',')) {
        if !trusted.contain(caller) {
            break;
        }
        caller = parse_hop(hop.trim())?.to_canonical();
    }
    Some(caller)
}

/// Some proxies write a port, and brackets around IPv6.
fn parse_hop(hop: &str) -> Option<IpAddr> {
    let bare = hop.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(hop);
    bare.parse().ok().or_else(|| hop.parse::<SocketAddr>().ok().map(|address| address.ip()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn networks(text: &str) -> Networks {
        text.parse().expect("networks")
    }

    fn caller(peer: &str, forwarded: &[&str], trusted: &str) -> Option<String> {
        caller_address(peer.parse().unwrap(), forwarded.iter().copied(), &networks(trusted)).map(|ip| ip.to_string())
    }

    #[test]
    fn a_header_from_a_peer_that_is_not_trusted_is_ignored() {
        assert_eq!(caller("10.0.0.9", &["1.2.3.4"], "").as_deref(), Some("10.0.0.9"));
        assert_eq!(caller("10.0.0.9", &["1.2.3.4"], "10.0.0.1").as_deref(), Some("10.0.0.9"));
    }

    #[test]
    fn the_header_is_read_from_the_right_past_trusted_proxies() {
        assert_eq!(caller("10.0.0.1", &["6.6.6.6, 1.2.3.4"], "10.0.0.0/8").as_deref(), Some("1.2.3.4"));
        assert_eq!(caller("10.0.0.1", &["6.6.6.6, 1.2.3.4", "10.0.0.2"], "10.0.0.0/8").as_deref(), Some("1.2.3.4"));
        assert_eq!(caller("10.0.0.1", &["10.0.0.3"], "10.0.0.0/8").as_deref(), Some("10.0.0.3"));
        assert_eq!(caller("10.0.0.1", &[], "10.0.0.0/8").as_deref(), Some("10.0.0.1"));
        assert_eq!(caller("::ffff:10.0.0.1", &["[2001:db8::1]:443"], "10.0.0.1").as_deref(), Some("2001:db8::1"));
    }

    #[test]
    fn garbage_from_a_trusted_proxy_is_nobody() {
        assert_eq!(caller("10.0.0.1", &["1.2.3.4, unknown"], "10.0.0.1"), None);
        assert_eq!(caller("10.0.0.1", &[""], "10.0.0.1"), None);
        assert_eq!(caller("10.0.0.1", &["garbage, 1.2.3.4"], "10.0.0.1").as_deref(), Some("1.2.3.4"));
    }

    #[test]
    fn networks_are_canonical() {
        assert_eq!(networks("192.168.1.7/16, 10.1.2.3").to_string(), "192.168.0.0/16,10.1.2.3/32");
        assert_eq!(networks("::ffff:10.0.0.0/104").to_string(), "10.0.0.0/8");
        for bad in ["10.0.0.0/33", "10.0.0", "localhost", "10.0.0.0/-1", "/8"] {
            assert!(bad.parse::<Networks>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn a_mapped_address_is_its_ipv4_address(bits: u32, prefix in 0_u8..=32, other: u32) {
            let v4 = std::net::Ipv4Addr::from(bits);
            let range = networks(&format!("{}/{prefix}", std::net::Ipv4Addr::from(other)));
            prop_assert_eq!(range.contain(v4.into()), range.contain(v4.to_ipv6_mapped().into()));
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            prop_assert_eq!(range.contain(v4.into()), bits & mask == other & mask);
        }

        #[test]
        fn what_comes_left_of_the_callers_own_hop_never_matters(forged in "[ -~]{0,40}", bits: u32) {
            let client = std::net::Ipv4Addr::from(bits | 0x8000_0000);
            let header = format!("{forged},{client}");
            let seen = caller_address("10.0.0.1".parse().unwrap(), [header.as_str()].into_iter(), &networks("10.0.0.1"));
            prop_assert_eq!(seen, Some(client.into()));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}") {
            if let Ok(read) = text.parse::<Networks>() {
                prop_assert_eq!(networks(&read.to_string()), read);
            }
            let _ = caller_address("10.0.0.1".parse().unwrap(), [text.as_str()].into_iter(), &networks("10.0.0.1"));
        }
    }
}
