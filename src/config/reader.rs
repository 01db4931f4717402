//! Reads a TOML document key by key, remembers where everything stood, and reports every problem at once.

use std::cell::RefCell;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::env::{self, Lookup};

/// Something to tell the operator about the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The byte of the file at which it is.
    pub at: usize,
    /// `false`: only a warning.
    pub error: bool,
    /// What is wrong and what to do.
    pub message: String,
}

/// The environment and the problems found so far.
pub struct Reader<'a> {
    lookup: Lookup<'a>,
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Reader<'a> {
    /// A reader that expands references with `lookup`.
    #[must_use]
    pub fn new(lookup: Lookup<'a>) -> Self {
        Self { lookup, problems: RefCell::default() }
    }

    /// Notes an error at a byte of the file.
    pub fn error(&self, at: usize, message: impl Into<String>) {
        self.problems.borrow_mut().push(Problem { at, error: true, message: message.into() });
    }

    /// Notes a warning at a byte of the file.
    pub fn warn(&self, at: usize, message: impl Into<String>) {
        self.problems.borrow_mut().push(Problem { at, error: false, message: message.into() });
    }

    /// Everything found, in the order of the file.
    #[must_use]
    pub fn into_problems(self) -> Vec<Problem> {
        let mut problems = self.problems.into_inner();
        problems.sort_by_key(|problem| problem.at);
        problems
    }
}

/// One table of the document. Every key that is asked for becomes a known one; [`Section::finish`] complains about
/// the others.
pub struct Section<'r, 'd> {
    reader: &'r Reader<'r>,
    table: Option<&'d DeTable<'d>>,
    /// How the table is called in messages: `[cache]`.
    title: String,
    /// Where the table begins.
    pub at: usize,
    known: Vec<&'static str>,
}

/// A string of the document after references were replaced, with its place.
pub struct Text {
    /// The text.
    pub value: String,
    /// The byte of the file at which it stood.
    pub at: usize,
}

impl<'r, 'd> Section<'r, 'd> {
    /// A table, or an absent one (all of whose keys then have their defaults).
    #[must_use]
    pub fn new(reader: &'r Reader<'r>, title: &str, table: Option<&'d DeTable<'d>>, at: usize) -> Self {
        Self { reader, table, title: title.to_owned(), at, known: Vec::new() }
    }

    fn raw(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.known.push(key);
        self.table?.get(key)
    }

    /// Where a key's value stands, or else the table.
    #[must_use]
    pub fn place(&self, key: &str) -> usize {
        self.table.and_then(|table| table.get(key)).map_or(self.at, |value| value.span().start)
    }

    /// Notes an error at a key.
    pub fn error(&self, key: &str, message: impl std::fmt::Display) {
        self.reader.error(self.place(key), format!("{key}: {message}"));
    }

    /// Notes a warning at a key.
    pub fn warn(&self, key: &str, message: impl std::fmt::Display) {
        self.reader.warn(self.place(key), format!("{key}: {message}"));
    }

    /// Whether the file gives the key a value. It is a known key from now on, so that misspellings of it are told.
    pub fn has(&mut self, key: &'static str) -> bool {
        self.known.push(key);
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// A sub-table.
    pub fn table(&mut self, key: &'static str, title: &str) -> Section<'r, 'd> {
        let value = self.raw(key);
        let at = value.map_or(self.at, |value| value.span().start);
        let table = value.and_then(|value| {
            let table = value.get_ref().as_table();
            if table.is_none() {
                self.error(key, format!("expected a table {title}, found {}", value.get_ref().type_str()));
            }
            table
        });
        Section::new(self.reader, title, table, at)
    }

    /// An array of tables.
    pub fn tables(&mut self, key: &'static str, title: &str) -> Vec<Section<'r, 'd>> {
        let Some(value) = self.raw(key) else { return Vec::new() };
        let Some(array) = value.get_ref().as_array() else {
            self.error(key, format!("expected tables {title}, found {}", value.get_ref().type_str()));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for item in array {
            match item.get_ref().as_table() {
                Some(table) => sections.push(Section::new(self.reader, title, Some(table), item.span().start)),
                None => self.reader.error(item.span().start, format!("expected a table {title}")),
            }
        }
        sections
    }

    /// A value that `parse` makes of the text; numbers and booleans count as their text, so that references may
    /// stand for them.
    pub fn parsed<T>(&mut self, key: &'static str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(key)?;
        match parse(&text.value) {
            Ok(value) => Some(value),
            Err(message) => {
                self.reader.error(text.at, format!("{key}: {message}"));
                None
            }
        }
    }

    /// A string, number or boolean as text.
    pub fn text(&mut self, key: &'static str) -> Option<Text> {
        let value = self.raw(key)?;
        let raw = match value.get_ref() {
            DeValue::String(text) => text.as_ref(),
            DeValue::Integer(number) if number.radix() == 10 => number.as_str(),
            DeValue::Float(number) => number.as_str(),
            DeValue::Boolean(true) => "true",
            DeValue::Boolean(false) => "false",
            other => {
                self.error(key, format!("expected a string, found {}", other.type_str()));
                return None;
            }
        };
        self.expand(key, raw, value.span())
    }

    fn expand(&self, key: &str, raw: &str, span: Range<usize>) -> Option<Text> {
        match env::expand(raw, self.reader.lookup) {
            Ok(value) => Some(Text { value, at: span.start }),
            Err(message) => {
                self.reader.error(span.start, format!("{key}: {message}"));
                None
            }
        }
    }

    /// A string.
    pub fn string(&mut self, key: &'static str) -> Option<String> {
        self.text(key).map(|text| text.value)
    }

    /// A list of strings.
    pub fn strings(&mut self, key: &'static str) -> Option<Vec<String>> {
        let value = self.raw(key)?;
        let Some(array) = value.get_ref().as_array() else {
            self.error(key, format!("expected a list of strings such as [\"symbol\"], found {}", value.get_ref().type_str()));
            return None;
        };
        let mut texts = Vec::new();
        for item in array {
            match item.get_ref().as_str() {
                Some(text) => texts.extend(self.expand(key, text, item.span()).map(|text| text.value)),
                None => self.reader.error(item.span().start, format!("{key}: expected strings, found {}", item.get_ref().type_str())),
            }
        }
        Some(texts)
    }

    /// A list of strings, empty if it is left out; or `None` for one word that stands in its place.
    pub fn strings_or(&mut self, key: &'static str, word: &str) -> Option<Vec<String>> {
        let text = self.raw(key).and_then(|value| value.get_ref().as_str());
        match text {
            Some(text) if text == word => None,
            Some(text) => {
                self.error(key, format!("expected a list of strings or \"{word}\", found \"{text}\""));
                Some(Vec::new())
            }
            None => Some(self.strings(key).unwrap_or_default()),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.choice(key, &[("true", true), ("false", false)])
    }

    /// A whole number within bounds.
    pub fn number(&mut self, key: &'static str, bounds: std::ops::RangeInclusive<u64>) -> Option<u64> {
        self.parsed(key, |text| match text.replace('_', "").parse() {
            Ok(number) if bounds.contains(&number) => Ok(number),
            _ => Err(format!("expected a whole number from {} to {}, found '{text}'", bounds.start(), bounds.end())),
        })
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        self.parsed(key, |text| {
            let found = choices.iter().find(|(word, _)| *word == text);
            let words: Vec<_> = choices.iter().map(|(word, _)| format!("\"{word}\"")).collect();
            found.map(|(_, value)| *value).ok_or_else(|| {
                format!("expected {}, found \"{text}\"{}", words.join(" or "), suggest(text, choices.iter().map(|(word, _)| *word)))
            })
        })
    }

    /// Complains about every key that was not asked for.
    pub fn finish(self) {
        for (key, _) in self.table.into_iter().flatten() {
            let name = key.get_ref().as_ref();
            if !self.known.contains(&name) {
                let hint = suggest(name, self.known.iter().copied());
                self.reader.error(key.span().start, format!("unknown key '{name}' in {}{hint}", self.title));
            }
        }
    }
}

/// "; did you mean 'ttl'?" for the nearest of `words`, if one is near.
fn suggest<'w>(found: &str, words: impl Iterator<Item = &'w str>) -> String {
    let best = words.map(|word| (strsim::jaro_winkler(found, word), word)).max_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((likeness, word)) if likeness > 0.75 => format!("; did you mean '{word}'?"),
        _ => String::new(),
    }
}
