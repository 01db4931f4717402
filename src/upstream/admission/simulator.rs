//! Drives the places and the queue through arrivals, ends and departures from a seed, and checks the invariants of the page after
//! each step.
//!
//! ```text
//! SLUICE_SEEDS=100000 cargo test --lib admission   # more seeds
//! SLUICE_SEED=17 cargo test --lib admission        # one seed, told step by step
//! ```

#![allow(clippy::print_stdout, reason = "a seed is told step by step")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use super::machine::{Arrival, Bounds, Joined, Machine, Party, Phase, Ticket};

const STEPS: usize = 300;

/// What is known of the requests besides the machine.
#[derive(Default)]
struct World {
    active: Vec<(Phase, Party)>,
    /// The places in `active` whose work is of use to nobody, or does not move.
    useless: Vec<(Phase, Party)>,
    pending: BTreeMap<Ticket, (Phase, Party)>,
    /// The places of the phase ask that last.
    lasting: Vec<(Phase, Party)>,
}

impl World {
    /// The first of those that are to lose their place so that a request of `party` gets it, if there is any.
    fn to_take_over(&self, machine: &Machine, phase: Phase, party: &Party) -> Option<usize> {
        let holders = self.useless.iter().enumerate().filter(|(_, (of, _))| *of == phase).map(|(number, (_, holder))| (number, holder));
        let in_order = match phase {
            Phase::Ask => machine.useless_for(party, holders.map(|(number, holder)| (number, holder, true))),
            Phase::Upload | Phase::Download | Phase::Stream => machine.unfair_to(phase, party, holders, Some),
        };
        in_order.first().copied()
    }

    /// A place is about to end, which may be one of those that last.
    fn ends(&mut self, machine: &mut Machine, ended: &(Phase, Party)) {
        if count(&self.lasting, ended) > 0 && count(&self.lasting, ended) == count(&self.active, ended) {
            self.lasting.remove(self.lasting.iter().position(|other| other == ended).unwrap_or_default());
            machine.lasts_no_longer(&ended.1);
        }
    }

    /// Takes a place out of `active`.
    fn remove(&mut self, ended: &(Phase, Party)) {
        if let Some(at) = self.active.iter().position(|active| active == ended) {
            self.active.swap_remove(at);
        }
    }

    fn admit(&mut self, tickets: Vec<Ticket>) -> Result<(), String> {
        for ticket in tickets {
            let admitted = self.pending.remove(&ticket).ok_or_else(|| format!("{ticket} was admitted and did not wait"))?;
            self.active.push(admitted);
        }
        Ok(())
    }
}

/// How often one is in a list.
fn count(list: &[(Phase, Party)], one: &(Phase, Party)) -> usize {
    list.iter().filter(|other| *other == one).count()
}

fn check(machine: &mut Machine, world: &World, bounds: Bounds) -> Result<(), String> {
    for (phase, most) in Phase::ALL.into_iter().zip([bounds.ask, bounds.upload, bounds.download, bounds.stream]) {
        let active = world.active.iter().filter(|(of, _)| *of == phase).count();
        let waiting = world.pending.values().filter(|(of, _)| *of == phase).count();
        if (machine.active(phase), machine.waiting(phase)) != (active, waiting) {
            return Err(format!(
                "{phase:?}: it counts {} and {}, of {active} and {waiting}",
                machine.active(phase),
                machine.waiting(phase)
            ));
        }
        if active > most {
            return Err(format!("{active} are active in {phase:?}, of {most}"));
        }
        // A party that holds nothing, and finds a place free, gets it.
        let newcomer = Party::client(IpAddr::from([192, 0, 2, 1]), "newcomer");
        if active < most && machine.arrive(Duration::ZERO, phase, &newcomer, false).0 != Arrival::Admitted {
            return Err(format!("a newcomer found no place in {phase:?} beside {active} of {most}"));
        }
        if active < most && !machine.end(Duration::ZERO, phase, &newcomer).is_empty() {
            return Err(format!("something waited in {phase:?} that could take a free place"));
        }
    }
    let newcomer = Party::client(IpAddr::from([192, 0, 2, 1]), "newcomer");
    // So does one on a rule that others ask for, as long as that rule may take one.
    let (rule, free) = ("a", bounds.ask - machine.active(Phase::Ask));
    let of_rule = world.active.iter().filter(|(of, by)| *of == Phase::Ask && &*by.rule == rule).count();
    if free > 0 && of_rule <= 15 * free {
        let beside = Party { rule: rule.into(), ..newcomer.clone() };
        if machine.arrive(Duration::ZERO, Phase::Ask, &beside, false).0 != Arrival::Admitted {
            return Err(format!("a newcomer found no place beside {of_rule} of its rule, where {free} are free"));
        }
        if !machine.end(Duration::ZERO, Phase::Ask, &beside).is_empty() {
            return Err("something waited that could take a free place".into());
        }
    }
    let is_one = |one: &Party, other: &Party| one.address == other.address && (one.address.is_some() || one.rule == other.rule);
    for (phase, most) in Phase::ALL.into_iter().zip([bounds.ask, bounds.upload, bounds.download, bounds.stream]) {
        let of_address = |party: &Party| world.active.iter().filter(|(of, by)| *of == phase && is_one(by, party)).count();
        let is_full = machine.active(phase) == most;
        let least = if phase == Phase::Ask { 1 } else { 2 };
        let may_give = world.useless.iter().any(|(of, holder)| *of == phase && of_address(holder) >= least);
        match world.to_take_over(machine, phase, &newcomer).map(|number| &world.useless[number]) {
            Some((_, holder)) if !is_full || of_address(holder) < least => return Err("a place was taken over for nothing".into()),
            None if is_full && may_give => return Err(format!("a newcomer found no place in {phase:?} beside one that is to be given up")),
            _ => {}
        }
    }
    if machine.queued() > bounds.queue {
        return Err(format!("{} wait, of {}", machine.queued(), bounds.queue));
    }
    Ok(())
}

/// Runs one seed.
fn run(seed: u64, is_told: bool) -> Result<(), String> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut number = |most: usize| random.usize(1..=most);
    let bounds = Bounds { ask: number(40), upload: number(10), download: number(20), stream: number(20), queue: number(40) };
    let (mut machine, mut world, mut now) = (Machine::new(bounds), World::default(), Duration::ZERO);
    let tell = |text: String| {
        if is_told {
            println!("{text}");
        }
    };
    tell(format!("{bounds:?}"));
    for _ in 0..STEPS {
        now += Duration::from_millis(random.u64(0..60));
        let rule = ["a", "b", "c"][random.usize(..3)];
        let party = match random.u8(..6) {
            0 => Party::own(rule),
            number => Party::client(IpAddr::from([10, 0, 0, number]), rule),
        };
        match random.u32(..14) {
            0..6 => {
                let phase = Phase::ALL[random.usize(..4)];
                let may_wait = matches!(phase, Phase::Ask | Phase::Upload);
                let mut has_room = false;
                let to_take_over = world.to_take_over(&machine, phase, &party);
                if let Some(number) = to_take_over.filter(|_| phase != Phase::Ask) {
                    let holder = world.useless.swap_remove(number);
                    tell(format!("{holder:?} is given up for {party:?}"));
                    machine.pass_on(phase, &holder.1, &party);
                    world.remove(&holder);
                    world.active.push((phase, party));
                    check(&mut machine, &world, bounds)?;
                    continue;
                }
                if let Some(number) = to_take_over {
                    let holder = world.useless.swap_remove(number);
                    world.ends(&mut machine, &holder);
                    let admitted = machine.end(now, phase, &holder.1);
                    tell(format!("{holder:?} is given up for {party:?}: {admitted:?} go on"));
                    has_room = admitted.is_empty();
                    world.remove(&holder);
                    world.admit(admitted)?;
                }
                let (arrival, displaced) = machine.arrive(now, phase, &party, may_wait);
                let of_another = displaced.and_then(|ticket| world.pending.get(&ticket)).is_some_and(|(_, other)| other.rule != party.rule);
                if of_another && machine.queued() < bounds.queue {
                    return Err("a request of another rule was displaced though the queue had room".into());
                }
                if let Some(displaced) = displaced
                    && (world.pending.remove(&displaced).is_none() || !matches!(arrival, Arrival::Pending(_)))
                {
                    return Err(format!("{displaced} was displaced and did not wait"));
                }
                tell(format!("{party:?} arrives for {phase:?}: {arrival:?}"));
                if has_room && arrival != Arrival::Admitted {
                    return Err("what was given up was not enough".into());
                }
                match arrival {
                    Arrival::Admitted => world.active.push((phase, party)),
                    Arrival::Pending(ticket) => drop(world.pending.insert(ticket, (phase, party))),
                    Arrival::Refused => {}
                }
            }
            6 if !world.active.is_empty() => {
                let useless = world.active[random.usize(..world.active.len())].clone();
                if count(&world.useless, &useless) < count(&world.active, &useless) {
                    tell(format!("{useless:?} is of use to nobody"));
                    world.useless.push(useless);
                }
            }
            11 if !world.active.is_empty() => {
                let lasting = world.active[random.usize(..world.active.len())].clone();
                if lasting.0 == Phase::Ask && count(&world.lasting, &lasting) < count(&world.active, &lasting) {
                    tell(format!("{lasting:?} lasts"));
                    machine.lasts(&lasting.1);
                    world.lasting.push(lasting);
                }
            }
            12 => {
                let is_scarce = !machine.is_scarce();
                let admitted = machine.set_scarce(now, is_scarce);
                tell(format!("places are scarce: {is_scarce}; {admitted:?} go on"));
                if is_scarce && !admitted.is_empty() {
                    return Err("something waited that could take a free place".into());
                }
                world.admit(admitted)?;
            }
            13 => {
                // All who wait for it have many.
                let holders = world.lasting.iter().enumerate().map(|(number, (_, holder))| (number, holder.clone(), Vec::new()));
                let Some(&number) = machine.outlasting(&party, holders).first() else { continue };
                let taken = world.lasting[number].clone();
                let held = |party: &Party| world.active.iter().filter(|(of, by)| *of == Phase::Ask && by.address == party.address).count();
                if taken.1.address.is_some() && held(&taken.1) < held(&party) + 2 {
                    return Err(format!("{taken:?} was taken away for {party:?}, which has as many"));
                }
                tell(format!("{taken:?} is taken away for {party:?}"));
                world.lasting.swap_remove(number);
                machine.lasts_no_longer(&taken.1);
                world.remove(&taken);
                if count(&world.useless, &taken) > count(&world.active, &taken) {
                    world.useless.remove(world.useless.iter().position(|other| *other == taken).unwrap_or_default());
                }
                let admitted = machine.end(now, Phase::Ask, &taken.1);
                let is_enough = !admitted.is_empty() || machine.arrive(now, Phase::Ask, &party, false).0 == Arrival::Admitted;
                if !is_enough {
                    return Err("what was taken away was not enough".into());
                }
                if admitted.is_empty() {
                    world.active.push((Phase::Ask, party));
                }
                world.admit(admitted)?;
            }
            9 if !world.pending.is_empty() => {
                let number = random.usize(..world.pending.len());
                let Some((&ticket, waiting)) = world.pending.iter_mut().nth(number) else { continue };
                let joined = machine.join(now, ticket, &party);
                tell(format!("{party:?} asks for the same as {ticket}: {joined:?}"));
                match joined {
                    Joined::Admitted => {
                        let phase = waiting.0;
                        world.pending.remove(&ticket);
                        world.active.push((phase, party));
                    }
                    Joined::Moved => waiting.1 = party,
                    Joined::Unchanged => {}
                }
            }
            7..9 if !world.active.is_empty() => {
                let (phase, party) = world.active[random.usize(..world.active.len())].clone();
                world.ends(&mut machine, &(phase, party.clone()));
                world.remove(&(phase, party.clone()));
                let ended = (phase, party.clone());
                if count(&world.useless, &ended) > count(&world.active, &ended) {
                    world.useless.retain(|useless| *useless != ended);
                    world.useless.extend(world.active.iter().filter(|active| **active == ended).cloned());
                }
                let admitted = machine.end(now, phase, &party);
                tell(format!("{party:?} ends {phase:?}: {admitted:?} go on"));
                world.admit(admitted)?;
            }
            _ => {
                let ticket = world.pending.keys().nth(random.usize(..world.pending.len().max(1))).copied();
                if let Some(ticket) = ticket {
                    tell(format!("{ticket} leaves"));
                    world.pending.remove(&ticket);
                    if !machine.leave(ticket) {
                        return Err(format!("{ticket} did not wait"));
                    }
                }
            }
        }
        check(&mut machine, &world, bounds)?;
    }
    while let Some((phase, party)) = world.active.last().cloned() {
        world.ends(&mut machine, &(phase, party.clone()));
        world.active.pop();
        let admitted = machine.end(now, phase, &party);
        world.admit(admitted)?;
    }
    match (world.pending.len(), machine.is_empty()) {
        (0, true) => Ok(()),
        (left, is_empty) => Err(format!("{left} wait for ever, nothing is counted: {is_empty}")),
    }
}

#[test]
fn no_seed_breaks_an_invariant() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = number("SLUICE_SEED").map_or_else(|| 0..number("SLUICE_SEEDS").unwrap_or(300), |seed| seed..seed + 1);
    let is_told = number("SLUICE_SEED").is_some();
    for seed in seeds {
        if let Err(what) = run(seed, is_told) {
            panic!("SLUICE_SEED={seed}: {what}");
        }
    }
}
