//! Who may manage: named tokens, each with what it may do.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};

use super::reader::Section;
use super::secret::Secret;
use crate::request::refusal::Refusal;

/// Something that needs a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Removing or expiring what is stored.
    Purge,
    /// Having targets asked for.
    Warm,
    /// Having the configuration read again.
    Reload,
    /// Stopping the program, for another process that takes over.
    Stop,
}

impl Right {
    /// Every right with its word in the configuration and in the audit line.
    pub const ALL: [(&'static str, Self); 4] =
        [("purge", Self::Purge), ("warm", Self::Warm), ("reload", Self::Reload), ("stop", Self::Stop)];

    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        Self::ALL.iter().find(|(_, right)| *right == self).map_or("", |(word, _)| word)
    }
}

/// One token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Its name, for the audit line.
    pub name: String,
    /// What is sent as `Authorization: Bearer …`.
    pub secret: Secret,
    /// What it may do.
    pub may: Vec<Right>,
}

/// All tokens; without any, nobody may manage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tokens(pub Vec<Token>);

impl Tokens {
    /// The name of the token that a request has, if it may do this.
    ///
    /// # Errors
    /// Why it may not.
    pub fn authorize(&self, headers: &HeaderMap, right: Right) -> Result<&str, Refusal> {
        if self.0.is_empty() {
            return Err(Refusal::NoToken);
        }
        let given = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer ")).unwrap_or_default();
        // Digests are compared, so that the time taken says nothing about the token.
        let digest = Sha256::digest(given);
        let token = self.0.iter().find(|token| Sha256::digest(token.secret.0.as_bytes()) == digest).ok_or(Refusal::Forbidden)?;
        if token.may.contains(&right) { Ok(&token.name) } else { Err(Refusal::NotAllowed) }
    }

    /// The first token that may do this; for reading, any.
    #[must_use]
    pub fn with(&self, right: Option<Right>) -> Option<&Secret> {
        self.0.iter().find(|token| right.is_none_or(|right| token.may.contains(&right))).map(|token| &token.secret)
    }
}

/// Reads `[admin] token`, which may do everything and is called `admin`, and `[[admin.tokens]]`.
pub fn tokens(section: &mut Section<'_, '_>) -> Tokens {
    let all = || Right::ALL.iter().map(|(_, right)| *right).collect();
    let main = section.string("token").filter(|token| !token.is_empty());
    let mut tokens: Vec<Token> =
        main.into_iter().map(|token| Token { name: "admin".to_owned(), secret: Secret(token), may: all() }).collect();
    for mut table in section.tables("tokens", "[[admin.tokens]]") {
        let name = table.string("name").unwrap_or_default();
        let secret = table.string("token").unwrap_or_default();
        let words = table.strings("may").unwrap_or_default();
        if name.is_empty() || tokens.iter().any(|token| token.name == name) {
            table.error("name", "every token needs a name of its own; 'admin' is that of admin.token");
        }
        if !table.has("may") {
            table.error("may", "missing: a list of \"purge\", \"warm\", \"reload\" and \"stop\"");
        }
        let mut may = Vec::new();
        for word in words {
            match Right::ALL.iter().find(|(known, _)| *known == word) {
                Some((_, right)) => may.push(*right),
                None => table.error("may", format!("expected \"purge\", \"warm\", \"reload\" or \"stop\", found \"{word}\"")),
            }
        }
        if !table.has("token") {
            table.error("token", "missing: what is sent as Authorization: Bearer …");
        } else if tokens.iter().any(|token| token.secret.0 == secret) {
            table.error("token", "is that of another token too");
        }
        // An empty one (of a variable that is not set) is no token.
        if !secret.is_empty() {
            tokens.push(Token { name, secret: Secret(secret), may });
        }
        table.finish();
    }
    Tokens(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check;
    use http::HeaderValue;

    #[test]
    fn a_token_may_do_what_it_may() {
        let text = "[backend]\nurl='http://127.0.0.1:1'\n[admin]\ntoken='root'\n[[admin.tokens]]\nname='dash'\ntoken='${DASH}'\nmay=['warm']\n[[admin.tokens]]\nname='unset'\ntoken='${NONE:-}'\nmay=['purge']\n";
        let config = check("t", text, &|name| (name == "DASH").then(|| "hush".to_owned())).config.unwrap();
        let tokens = &config.admin.tokens;
        let with = |token: &str| HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(&format!("Bearer {token}")).unwrap())]);
        assert_eq!(tokens.authorize(&with("root"), Right::Purge), Ok("admin"));
        assert_eq!(tokens.authorize(&with("hush"), Right::Warm), Ok("dash"));
        assert_eq!(tokens.authorize(&with("hush"), Right::Purge), Err(Refusal::NotAllowed));
        for wrong in [with(""), with("hus"), HeaderMap::new()] {
            assert_eq!(tokens.authorize(&wrong, Right::Warm), Err(Refusal::Forbidden));
        }
        assert_eq!(Tokens::default().authorize(&with("root"), Right::Purge), Err(Refusal::NoToken));
        assert!(!format!("{config:?}").contains("hush"));
        for (lines, expected) in [
            ("token='a'\nmay=[]", "every token needs a name"),
            ("name='a'\nmay=[]", "token: missing"),
            ("name='a'\ntoken='a'", "may: missing"),
            ("name='a'\ntoken='a'\nmay=['all']", "found \"all\""),
            ("name='a'\ntoken='root'\nmay=[]", "is that of another token too"),
        ] {
            let report =
                check("t", &text.replace("name='unset'\ntoken='${NONE:-}'\nmay=['purge']", lines), &|_| Some("hush".into())).report;
            assert!(report.iter().any(|line| line.contains(expected)), "{lines}: {report:?}");
        }
    }
}
