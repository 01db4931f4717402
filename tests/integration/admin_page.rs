//! The page of the admin listener, in a browser: what it shows, on what screens, by keyboard, and to a screen reader.

use crate::support::backend::Backend;
use crate::support::browser::Page;
use crate::support::sluice::{Sluice, TOKEN, one_rule};
use std::time::Duration;

/// Sluice that was asked for something already.
async fn asked() -> (Backend, Sluice) {
    let backend = Backend::slow(Duration::ZERO).await;
    let rules = format!("{}[[limit]]\nname = 'anybody'\nrate = '1000/s'\n", one_rule("ttl='1h'\ntags=['all']"));
    let sluice = Sluice::ruled(backend.address, "", &rules).await;
    for _ in 0..200 {
        assert_eq!(sluice.get("/api/symbols?token=hidden").await.status, 200);
    }
    (backend, sluice)
}

fn text_of(page: &mut Page, id: &str) -> String {
    page.value(&format!("document.getElementById('{id}').textContent")).as_str().unwrap().to_owned()
}

#[tokio::test]
async fn it_is_readable_on_a_desk_and_on_a_phone_by_day_and_by_night() {
    let (_backend, sluice) = asked().await;
    let url = format!("http://{}/", sluice.admin);
    for (width, height, dark) in [(1280, 900, false), (1280, 900, true), (390, 844, false), (390, 844, true)] {
        let mut page = Page::open(&url, (width, height), dark);
        page.until("!!document.querySelector('#tiles dd') && document.querySelectorAll('#charts path').length > 0").await;
        let shown = page.value("document.body.innerText").as_str().unwrap().to_owned();
        for expected in "memory filled|backend closed|Redis –|99.5 %|/api/symbols?token=…|1 entry|1 rule|anybody|nothing".split('|') {
            assert!(shown.contains(expected), "{width} {dark}: {expected} is missing in {shown}");
        }
        assert!(!shown.contains("hidden"), "{shown}");
        assert_eq!(page.value("document.documentElement.scrollWidth <= innerWidth"), true, "{width}: wider than the screen");
        let background = page.value("getComputedStyle(document.documentElement).backgroundColor").as_str().unwrap().to_owned();
        let first: u32 = background.trim_start_matches("rgb(").split(',').next().unwrap().parse().unwrap();
        assert_eq!(first < 100, dark, "{background}");
        assert!(page.complaints.is_empty(), "{:?}", page.complaints);
        if let Ok(folder) = std::env::var("SLUICE_PICTURES") {
            std::fs::write(format!("{folder}/page-{width}-{dark}.png.base64"), page.picture()).unwrap();
        }
    }
}

#[tokio::test]
async fn everything_can_be_done_by_keyboard() {
    let (_backend, sluice) = asked().await;
    let mut page = Page::open(&format!("http://{}/", sluice.admin), (1280, 900), false);
    page.until("!!document.querySelector('#tiles dd')").await;

    page.tab_to("target");
    page.type_text("/api/symbols");
    page.press("Enter");
    page.until("document.getElementById('explained').textContent.includes('rule       all')").await;

    // Left, refused, done: the token is asked for each time and kept nowhere.
    page.tab_to("what");
    page.type_text("all*");
    for (token, key, expected) in [("", "Escape", ""), ("wrong", "Enter", "401"), (TOKEN, "Enter", "1")] {
        page.value("document.getElementById('what').focus()");
        page.press("Enter");
        page.until("document.getElementById('confirm').open && document.activeElement.id === 'token'").await;
        assert!(text_of(&mut page, "question").contains("all*"));
        page.type_text(token);
        page.press(key);
        page.until("!document.getElementById('confirm').open").await;
        if !expected.is_empty() {
            page.until(&format!("document.getElementById('result').textContent.includes('{expected}')")).await;
        }
        // The page forgets it when the dialog tells that it was closed, which may be a moment later.
        page.until("document.getElementById('token').value === ''").await;
    }
    assert!(sluice.get("/api/symbols?token=hidden").await.cache_status().contains("fwd=uri-miss"), "it was purged");
}

#[tokio::test]
async fn a_screen_reader_is_told_what_everything_is() {
    let (_backend, sluice) = asked().await;
    let mut page = Page::open(&format!("http://{}/", sluice.admin), (1280, 900), false);
    page.until("!!document.querySelector('#tiles dd') && document.querySelectorAll('#charts svg').length > 0").await;
    let told = page.accessible();
    let named = |wanted: &str| told.iter().filter(|(role, _)| role == wanted).map(|(_, name)| name.as_str()).collect::<Vec<_>>();
    for role in ["button", "textbox", "combobox", "checkbox", "image", "img", "table", "region", "columnheader", "rowheader"] {
        assert!(named(role).iter().all(|name| !name.trim().is_empty()), "a {role} without a name: {told:?}");
    }
    assert_eq!(named("main").len(), 1);
    for heading in ["Now", "Rules", "Limits", "Asked for most", "Change"] {
        assert!(named("heading").contains(&heading), "{heading}: {:?}", named("heading"));
    }
    // Charts say in words what they show.
    let charts: Vec<&str> = [named("image"), named("img")].concat();
    assert!(charts.iter().any(|name| name.starts_with("Hit ratio:")), "{charts:?}");
    assert_eq!(page.value("document.documentElement.lang"), "en");
    // What changes by itself is announced where it matters, and nowhere else.
    assert_eq!(page.value("[...document.querySelectorAll('[role=status]')].map((one) => one.id).join()"), "explained,result");
}
