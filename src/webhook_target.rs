//! Where a webhook may go. The server must not be a way into networks that an app can't reach by itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use reqwest::Url;

use crate::network::Networks;

/// The longest address of a webhook, in bytes.
const LONGEST: usize = 2048;
/// Where clouds tell machines their secrets, beside the link-local address.
const METADATA: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254))];

/// Why a webhook may not go there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no address of a webhook.
    #[error("a webhook is an address such as https://app.lan/hook, of at most 2048 bytes and without a user in it")]
    NoAddress,
    /// It leads where none may go.
    #[error("webhooks don't go to {0}, where machines keep their own secrets or nobody listens")]
    Never(IpAddr),
    /// It leads where the app's may not go.
    #[error(
        "webhooks of this app don't go to {0}; they go where its token may come from, or, as the operator may have it, to the networks of CLAWDFORGE_WEBHOOK_CIDRS"
    )]
    Elsewhere(IpAddr),
    /// It leads to the server itself.
    #[error("webhooks don't go to the server itself")]
    Own,
}

/// An address that is well formed.
#[derive(Clone, Debug)]
pub struct Target {
    /// Of a name or an address, as it was written, without brackets.
    pub host: String,
    /// The port, also where none is named.
    pub port: u16,
}

impl Target {
    /// Reads the address of a webhook.
    pub fn read(url: &str) -> Result<Self, Refused> {
        // By what sends it, which takes many spellings for an address.
        let read = Url::parse(url).ok().filter(|_| url.len() <= LONGEST).ok_or(Refused::NoAddress)?;
        let anonymous = read.username().is_empty() && read.password().is_none();
        match (read.scheme(), read.host_str(), read.port_or_known_default()) {
            ("http" | "https", Some(host), Some(port)) if anonymous => {
                Ok(Self { host: host.trim_start_matches('[').trim_end_matches(']').to_owned(), port })
            }
            _ => Err(Refused::NoAddress),
        }
    }

    /// The address that it names instead of a name.
    pub fn literal(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }
}

/// Where an app's webhooks may go.
#[derive(Clone, Debug)]
pub struct Reach<'a> {
    /// The networks of the operator's setting.
    pub setting: Option<&'a Networks>,
    /// Where the app's token may come from; none means where the server answers. `None` for the operator's own webhook, which may go anywhere.
    pub token: Option<&'a Networks>,
    /// Where the server answers.
    pub allow: &'a Networks,
    /// The server's own port.
    pub port: u16,
}

impl Reach<'_> {
    /// Whether a webhook may go to this address.
    pub fn check(&self, address: IpAddr, port: u16) -> Result<(), Refused> {
        let address = real(address);
        if is_never(address) {
            return Err(Refused::Never(address));
        }
        let may = match (self.setting, self.token) {
            (_, None) => true,
            (Some(setting), _) => setting.contain(address),
            (None, Some(token)) if token.is_empty() => self.allow.contain(address),
            (None, Some(token)) => token.contain(address),
        };
        if !may {
            return Err(Refused::Elsewhere(address));
        }
        // Only an address of this machine can be bound.
        if port == self.port && UdpSocket::bind((address, 0)).is_ok() {
            return Err(Refused::Own);
        }
        Ok(())
    }
}

/// The IPv4 address that an IPv6 one stands for, if it does.
fn real(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(six) => {
            let [first, second, third, .., seventh, eighth] = six.segments();
            let four = |high: u16, low: u16| IpAddr::V4(Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low)));
            match (first, second) {
                // Translated (RFC 6052), and 6to4.
                (0x64, 0xff9b) => four(seventh, eighth),
                (0x2002, _) => four(second, third),
                _ => IpAddr::V6(six),
            }
        }
        four @ IpAddr::V4(_) => four,
    }
}

fn is_never(address: IpAddr) -> bool {
    let local = match address {
        IpAddr::V4(four) => four.is_link_local() || four.is_broadcast() || four.octets()[0] == 0,
        IpAddr::V6(six) => six.is_unicast_link_local() || six.is_unspecified(),
    };
    local || address.is_multicast() || METADATA.contains(&address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_or_refused() {
        let read = |url: &str| Target::read(url).map(|target| (target.host, target.port));
        assert_eq!(read("https://app.lan/hook?full=1"), Ok(("app.lan".to_owned(), 443)));
        assert_eq!(read("http://[::1]:9000"), Ok(("::1".to_owned(), 9000)));
        for loopback in ["http://127.1", "http://0x7f.1/", "http://2130706433/", "http://%31%32%37.0.0.1/", "http://127.0.0.1./"] {
            assert_eq!(Target::read(loopback).unwrap().literal(), Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), "{loopback}");
        }
        for wrong in [
            "",
            "app.lan/hook",
            "ftp://app.lan/",
            "file:///etc/passwd",
            "http://user:secret@app.lan/",
            "http://",
            "/hook",
            &format!("http://a/{}", "x".repeat(2048)),
        ] {
            assert_eq!(read(wrong), Err(Refused::NoAddress), "{wrong}");
        }
    }

    #[test]
    fn no_webhook_goes_where_machines_keep_secrets_or_the_app_can_not_go() {
        let networks = |list: &str| list.parse::<Networks>().unwrap();
        let (lan, loopback, all, none) =
            (networks("192.168.0.0/16"), networks("127.0.0.0/8,::1"), networks("0.0.0.0/0,::/0"), networks(""));
        let allow = networks("127.0.0.0/8,::1,192.168.0.0/16,10.0.0.0/8");
        let check = |setting: Option<&Networks>, token: Option<&Networks>, address: &str| {
            Reach { setting, token, allow: &allow, port: 8800 }.check(address.parse().unwrap(), 80)
        };
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "0.0.0.0",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "fd00:ec2::254",
            "100.100.100.200",
        ] {
            for (setting, token) in [(Some(&all), Some(&all)), (None, Some(&all)), (None, None)] {
                assert!(matches!(check(setting, token, address), Err(Refused::Never(_))), "{address}");
            }
        }
        for (setting, token, address, may) in [
            (None, &lan, "192.168.1.1", true),
            (None, &lan, "127.0.0.1", false),
            (None, &lan, "10.0.0.1", false),
            (None, &loopback, "127.0.0.1", true),
            (None, &loopback, "::ffff:127.0.0.1", true),
            (None, &loopback, "64:ff9b::c0a8:101", false),
            (None, &none, "10.0.0.1", true),
            (None, &none, "8.8.8.8", false),
            (Some(&all), &lan, "8.8.8.8", true),
            (Some(&lan), &loopback, "127.0.0.1", false),
        ] {
            assert_eq!(check(setting, Some(token), address).is_ok(), may, "{address}");
        }
        let own = |address: &str, port| {
            Reach { setting: None, token: Some(&none), allow: &allow, port: 8800 }.check(address.parse().unwrap(), port)
        };
        assert_eq!((own("127.0.0.1", 8800), own("127.0.0.1", 8801)), (Err(Refused::Own), Ok(())));
    }
}
