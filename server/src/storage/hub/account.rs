//! Where the hub is and who asks it, as its own client reads them from the environment.
use crate::{
    error::{Error, Result},
    storage::connect::is_true,
};
use reqwest::header::HeaderValue;
use std::{collections::BTreeMap, io, path::PathBuf};
use url::{Host, Url};

/// The hub, where `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";
/// Hosts that the hub sends readers of files on to are these, or lie below them. It says so itself
/// at `/.well-known/meta.json`.
const HOSTS: [&str; 2] = ["hf.co", "huggingface.co"];

/// The hub's address, and the token for it.
#[derive(Debug)]
pub(super) struct Account {
    pub endpoint: Url,
    /// `Bearer …`; marked as sensitive, so that it is not printed.
    pub token: Option<HeaderValue>,
}

impl Account {
    /// Reads the environment, whose names are in small letters, and the file of the token.
    ///
    /// # Errors
    /// `InvalidArgument`: the environment forbids the hub, or a variable cannot be used.
    pub(super) fn of(environment: &BTreeMap<String, String>) -> Result<Self> {
        let variables = Variables(environment);
        if variables.is_set("hf_hub_offline") {
            let message = "HF_HUB_OFFLINE is set in the environment of this process, so the hub is \
                           not asked; unset it, or name the data by another URI than hf://";
            return Err(Error::invalid("uri", message));
        }
        let endpoint = variables.get("hf_endpoint").unwrap_or(ENDPOINT);
        let url = Url::parse(endpoint.trim_end_matches('/')).ok();
        let is_plain = |url: &Url| url.username().is_empty() && url.password().is_none();
        let url = url.filter(|url| ["http", "https"].contains(&url.scheme()) && is_plain(url));
        let Some(endpoint) = url else {
            let message = "HF_ENDPOINT is no address of a hub; write https://HOST";
            return Err(Error::invalid("uri", message));
        };
        let token = if variables.is_set("hf_hub_disable_implicit_token") {
            None
        } else {
            token(&variables)?
        };
        let header = token.map(|token| {
            let mut header = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| {
                let message = "the token of HF_TOKEN, or of its file, has signs that no token \
                               has; copy it anew";
                Error::invalid("uri", message)
            })?;
            header.set_sensitive(true);
            Ok::<_, Error>(header)
        });
        Ok(Self {
            endpoint,
            token: header.transpose()?,
        })
    }

    /// Returns whether `url` is at the hub's own host, to which alone the token goes.
    pub(super) fn is_at(&self, url: &Url) -> bool {
        self.endpoint.origin() == url.origin()
    }

    /// Returns whether the hub may send a reader on to `url`.
    pub(super) fn trusts(&self, url: &Url) -> bool {
        let is_own = |host: &str| {
            let above = HOSTS.iter().find_map(|own| host.strip_suffix(*own));
            above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
        };
        let host = match url.host() {
            Some(Host::Domain(name)) if url.scheme() == "https" => name,
            _ => return self.is_at(url),
        };
        self.is_at(url) || is_own(host)
    }

    /// Returns the URL of an interface: the endpoint, `parts` below it, each encoded whole, and a
    /// query.
    pub(super) fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>, query: &str) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url.set_query(Some(query));
        url
    }
}

/// The environment's variables, without those that are blank.
struct Variables<'a>(&'a BTreeMap<String, String>);

impl Variables<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        let value = self.0.get(name)?.trim();
        (!value.is_empty()).then_some(value)
    }

    fn is_set(&self, name: &str) -> bool {
        self.get(name).is_some_and(is_true)
    }

    /// Returns a path, in which `~/` is the user's folder.
    fn path(&self, name: &str) -> Option<PathBuf> {
        let given = self.get(name)?;
        let below = given.strip_prefix("~/");
        let home = below.and_then(|below| Some(PathBuf::from(self.get("home")?).join(below)));
        Some(home.unwrap_or_else(|| given.into()))
    }
}

/// Returns the token of the environment, else that of the file in which a log-in keeps it.
fn token(variables: &Variables<'_>) -> Result<Option<String>> {
    let given = variables.get("hf_token");
    if let Some(given) = given.or_else(|| variables.get("hugging_face_hub_token")) {
        return Ok(Some(given.to_owned()));
    }
    let cache = || {
        let home = || Some(variables.path("home")?.join(".cache"));
        let cache = variables.path("xdg_cache_home").or_else(home)?;
        Some(cache.join("huggingface"))
    };
    let home = || Some(variables.path("hf_home").or_else(cache)?.join("token"));
    let Some(path) = variables.path("hf_token_path").or_else(home) else {
        return Ok(None);
    };
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
        // Nobody logged in.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(cause) => {
            let message = format!(
                "cannot read the hub's token in {}; make the file readable, or set HF_TOKEN",
                path.display()
            );
            Err(Error::invalid("uri", message).because(cause))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(variables: &[(&str, &str)]) -> Result<Account> {
        let variables = variables.iter();
        let variables = variables.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Account::of(&variables.collect())
    }

    fn token_of(variables: &[(&str, &str)]) -> Option<String> {
        let token = account(variables).unwrap().token?;
        assert!(token.is_sensitive(), "it would be printed");
        Some(token.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_token_is_where_the_hubs_client_looks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(token_of(&[("home", home)]), None);
        write(".cache/huggingface/token", "of-cache\n");
        write("xdg/huggingface/token", "of-xdg");
        write("hf/token", "of-home");
        write("elsewhere", " of-path \n");
        let xdg = format!("{home}/xdg");
        let mut variables = vec![("home", home)];
        for (more, found) in [
            (None, "of-cache"),
            (Some(("xdg_cache_home", xdg.as_str())), "of-xdg"),
            (Some(("hf_home", "~/hf")), "of-home"),
            (Some(("hf_token_path", "~/elsewhere")), "of-path"),
            (Some(("hugging_face_hub_token", "older")), "older"),
            (Some(("hf_token", " given\n")), "given"),
        ] {
            variables.extend(more);
            assert_eq!(token_of(&variables), Some(format!("Bearer {found}")));
        }
        variables.push(("hf_hub_disable_implicit_token", "1"));
        assert_eq!(token_of(&variables), None);
        let error = account(&[("hf_token_path", home)]).unwrap_err();
        assert!(error.chain().contains("cannot read the hub's token"));
        let error = account(&[("hf_token", "se\u{7}cret")]).unwrap_err();
        assert!(!error.chain().contains("cret"), "{}", error.chain());
    }

    #[test]
    fn an_environment_that_forbids_the_hub_is_obeyed() {
        for value in ["1", "true", "YES"] {
            let error = account(&[("hf_hub_offline", value)]).unwrap_err();
            assert!(error.chain().contains("HF_HUB_OFFLINE"));
        }
        account(&[("hf_hub_offline", "0")]).unwrap();
        let error = account(&[("hf_endpoint", "hub.example")]).unwrap_err();
        assert!(error.chain().contains("HF_ENDPOINT is no address"));
    }

    #[test]
    fn only_the_hubs_own_hosts_are_trusted() {
        let account = account(&[("hf_endpoint", "http://hub.example:8080/hf/")]).unwrap();
        let url = account.url(["api", "a b", "refs/pr/1"], "x=1");
        let expected = "http://hub.example:8080/hf/api/a%20b/refs%2Fpr%2F1?x=1";
        assert_eq!(url.as_str(), expected);
        for (url, is_trusted) in [
            ("http://hub.example:8080/x", true),
            ("http://hub.example/x", false),
            ("https://hub.example:8080/x", false),
            ("https://hf.co/x", true),
            ("https://us.aws.cdn.hf.co/x", true),
            ("https://cdn-lfs.huggingface.co/x", true),
            ("http://us.aws.cdn.hf.co/x", false),
            ("https://evilhf.co/x", false),
            ("https://hf.co.evil.example/x", false),
            ("https://10.0.0.1/x", false),
        ] {
            let url = Url::parse(url).unwrap();
            assert_eq!(account.trusts(&url), is_trusted, "{url}");
            let is_at = url.as_str().starts_with("http://hub.example:8080/");
            assert_eq!(account.is_at(&url), is_at, "{url}");
        }
    }
}
