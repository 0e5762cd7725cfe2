//! Packets wait for the answer about their connection. One task has all the state, and waits for
//! neither the service nor a packet alone.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    io,
    net::SocketAddr,
    pin::pin,
    time::{Duration, Instant},
};

use tokio_nfqueue::{
    DetachedPacket, Divert, Error, Hook, Packet, Protocol, Queue, Rule, conntrack::Direction, divert::Match,
};

use super::{
    Options, end_signal, process,
    service::{Answer, Service},
};

/// How long a question stays open, and an answer is remembered.
const MEMORY: Duration = Duration::from_secs(60);
/// How many packets of a connection wait for its answer.
const PACKETS: usize = 16;

pub(crate) async fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let mut end = pin!(end_signal()?);
    let mut rule = Rule::new(Hook::Output)
        .when(Match::protocols([Protocol::Tcp, Protocol::Udp]))
        // Not replies to those who have connected to this host.
        .when(Match::direction(Direction::Original))
        .unless(Match::interface("lo"));
    if let Some(port) = options.port {
        rule = rule.destination_port(port);
    }
    let queue = Queue::builder(Queue::ANY)
        .uid_gid(true)
        // Headers are enough.
        .copy_range(128)
        .deadline(options.deadline, options.default)
        .on_unanswered(options.default)
        .divert(Divert::builder().rule(rule));
    let (mut packets, verdicts) = queue.bind().await?.split();
    eprintln!("ready");

    let mut filter = Filter::new(options);
    loop {
        tokio::select! {
            packet = packets.recv() => {
                let Some(packet) = packet else { break };
                filter.receive(packet?).await?;
            }
            answers = filter.service.answers() => match answers {
                Ok(answers) => answers.into_iter().try_for_each(|answer| filter.answer(answer))?,
                Err(error) => filter.disconnect(&error)?,
            },
            () = &mut end => break,
        }
    }
    // Packets that wait get the default action.
    drop(filter.asked);
    let closed = verdicts.close().await;
    let (stats, Counts { asked, allowed, denied, by_default, wrong }) = (verdicts.stats(), filter.counts);
    println!(
        "{asked} questions: {allowed} allowed, {denied} denied, {} unanswered; \
         by default {} packets after the deadline, {by_default} at once; {wrong} wrong answers",
        asked - allowed - denied,
        stats.decided.expired
    );
    Ok(closed?)
}

struct Filter {
    options: Options,
    service: Service,
    /// What was said when the service was last reached, or not.
    is_up: Option<bool>,
    /// The open questions by number, so that the oldest is the first.
    asked: BTreeMap<u64, Question>,
    known: HashMap<Connection, Known>,
    /// The connections with an answer, the oldest first.
    answered: VecDeque<(Instant, Connection)>,
    counts: Counts,
}

struct Question {
    connection: Connection,
    syn: Option<u32>,
    since: Instant,
    packets: Vec<DetachedPacket>,
}

/// What is known of a connection, and the sequence number of its SYN. Another SYN begins another
/// connection on the same addresses and ports, perhaps that of another program.
#[derive(Clone, Copy)]
struct Known {
    state: State,
    syn: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Asked(u64),
    /// The answer, and when it came.
    Answered(bool, Instant),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Connection {
    protocol: Protocol,
    source: SocketAddr,
    destination: SocketAddr,
}

#[derive(Default)]
struct Counts {
    asked: u64,
    allowed: u64,
    denied: u64,
    by_default: u64,
    wrong: u64,
}

impl Filter {
    fn new(options: Options) -> Self {
        Self {
            service: Service::new(options.socket.clone()),
            options,
            is_up: None,
            asked: BTreeMap::new(),
            known: HashMap::new(),
            answered: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    async fn receive(&mut self, packet: Packet) -> Result<(), Error> {
        self.forget();
        // A malformed packet: no receiver takes it.
        let Some(connection) = Connection::of(&packet) else { return self.by_default(packet.detach()) };
        let syn = syn(&packet);
        let mut known = self.known.get(&connection).copied();
        if known.is_some_and(|known| syn.is_some() && syn != known.syn) {
            self.end(&connection)?;
            known = None;
        }
        match known.map(|known| known.state) {
            Some(State::Answered(allow, _)) => decide(packet.detach(), allow),
            Some(State::Asked(id)) => match self.asked.get_mut(&id) {
                // Behind the deadline, the service is too slow, and packets need not wait for it.
                Some(Question { since, packets, .. })
                    if since.elapsed() < self.options.deadline && packets.len() < PACKETS =>
                {
                    packets.push(packet.detach());
                    Ok(())
                }
                _ => self.by_default(packet.detach()),
            },
            None if self.asked.len() >= self.options.questions => self.by_default(packet.detach()),
            None => self.ask(packet, connection, syn).await,
        }
    }

    /// Forgets a connection in whose place another one begins.
    fn end(&mut self, connection: &Connection) -> Result<(), Error> {
        let Some(Known { state: State::Asked(id), .. }) = self.known.remove(connection) else { return Ok(()) };
        let packets = self.asked.remove(&id).map(|question| question.packets).unwrap_or_default();
        packets.into_iter().try_for_each(|packet| packet.drop().submit())
    }

    async fn ask(&mut self, packet: Packet, connection: Connection, syn: Option<u32>) -> Result<(), Error> {
        if let Err(error) = self.service.connect().await {
            self.disconnect(&error)?;
            return self.by_default(packet.detach());
        }
        let (id, since) = (self.counts.asked, Instant::now());
        if let Err(error) = self.service.ask(&connection.question(id, packet.uid())) {
            self.disconnect(&error)?;
            return self.by_default(packet.detach());
        }
        if self.is_up.replace(true) == Some(false) {
            eprintln!("firewall: the service is back");
        }
        self.counts.asked += 1;
        self.known.insert(connection, Known { state: State::Asked(id), syn });
        self.asked.insert(id, Question { connection, syn, since, packets: vec![packet.detach()] });
        Ok(())
    }

    fn answer(&mut self, answer: Answer) -> Result<(), Error> {
        let question = match answer {
            Answer::To(id, allow) => self.asked.remove(&id).map(|question| (question, allow)),
            Answer::Nonsense => None,
        };
        let Some((question, allow)) = question else {
            self.counts.wrong += 1;
            return Ok(());
        };
        *(if allow { &mut self.counts.allowed } else { &mut self.counts.denied }) += 1;
        // Packets of the connection may be in the queue, and come again if the answer is too late.
        let now = Instant::now();
        let known = Known { state: State::Answered(allow, now), syn: question.syn };
        self.known.insert(question.connection, known);
        self.answered.push_back((now, question.connection));
        question.packets.into_iter().try_for_each(|packet| decide(packet, allow))
    }

    /// Open questions will have no answers: a service that comes back does not know them.
    fn disconnect(&mut self, error: &io::Error) -> Result<(), Error> {
        if self.is_up.replace(false) != Some(false) {
            eprintln!("firewall: the service is down: {error}");
        }
        self.service.disconnect();
        for (_, question) in std::mem::take(&mut self.asked) {
            self.known.remove(&question.connection);
            question.packets.into_iter().try_for_each(|packet| self.by_default(packet))?;
        }
        Ok(())
    }

    fn by_default(&mut self, packet: DetachedPacket) -> Result<(), Error> {
        self.counts.by_default += 1;
        packet.decide(self.options.default).submit()
    }

    /// Forgets what is too old, and answers of which there are too many.
    fn forget(&mut self) {
        while let Some(first) = self.asked.first_entry() {
            if first.get().since.elapsed() < MEMORY {
                break;
            }
            self.known.remove(&first.remove().connection);
        }
        while let Some((since, connection)) = self.answered.front() {
            if since.elapsed() < MEMORY && self.answered.len() <= self.options.questions {
                break;
            }
            // Not what is known of a later connection on the same addresses and ports.
            let is_it = |known: &Known| matches!(known.state, State::Answered(_, at) if at == *since);
            if self.known.get(connection).is_some_and(is_it) {
                self.known.remove(connection);
            }
            self.answered.pop_front();
        }
    }
}

/// The sequence number of a segment that begins a connection.
fn syn(packet: &Packet) -> Option<u32> {
    let tcp = packet.view().ok()?.tcp()?;
    (tcp.syn && !tcp.ack).then_some(tcp.sequence_number)
}

fn decide(packet: DetachedPacket, allow: bool) -> Result<(), Error> {
    let verdict = if allow { packet.accept() } else { packet.reject() };
    verdict.for_flow().submit()
}

impl Connection {
    fn of(packet: &Packet) -> Option<Self> {
        let view = packet.view().ok()?;
        Some(Self {
            protocol: view.protocol(),
            source: SocketAddr::new(view.source_address(), view.source_port()?),
            destination: SocketAddr::new(view.destination_address(), view.destination_port()?),
        })
    }

    fn question(&self, id: u64, user: Option<u32>) -> String {
        let Self { protocol, source, destination } = self;
        let user = user.map_or_else(|| "-".to_owned(), |user| user.to_string());
        let name = process::name(*protocol, *source, *destination).unwrap_or_else(|| "?".to_owned());
        let protocol = if *protocol == Protocol::Tcp { "tcp" } else { "udp" };
        format!("ask {id} {protocol} {source} {destination} {user} {name}\n")
    }
}
