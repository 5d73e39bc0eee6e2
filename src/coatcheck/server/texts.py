"""Every sentence the server says to people, in English and Korean, and which of the two somebody gets.

Decides wording alone. Both languages stand side by side under one key, so neither can lack a text. No text tells
whether an account exists. Values are put in as they are: whoever renders a page escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

from coatcheck.server.negotiation import preferences

Language: TypeAlias = Literal["en", "ko"]

DEFAULT: Final[Language] = "en"

TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    # Answers of the JSON API.
    "api.login": ("Login successful", "로그인했습니다"),
    "api.logout": ("Logout complete", "로그아웃했습니다"),
    "api.logout_pending": (
        "Logged out here; everywhere else as soon as the store answers again",
        "여기서는 로그아웃했습니다. 저장소가 다시 응답하면 모든 곳에 적용됩니다",
    ),
    "api.step_up": ("Confirmed", "확인했습니다"),
    # Every page.
    "frame.account": ("Account", "계정"),
    "frame.sign_in": ("Sign in", "로그인"),
    "frame.sign_out": ("Sign out", "로그아웃"),
    "frame.home": ("Back to the start page", "첫 화면으로"),
    # The start page.
    "home.title": ("Welcome", "환영합니다"),
    "home.signed_in": ("Hello, {name}", "{name}님, 안녕하세요"),
    "home.signed_in_text": ("You are signed in.", "로그인되어 있습니다."),
    "home.signed_in_admin": ("You are signed in as an administrator.", "관리자로 로그인되어 있습니다."),
    "home.to_account": ("Your account and devices", "내 계정과 기기"),
    "home.signed_out_text": ("You are not signed in.", "로그인되어 있지 않습니다."),
    # Before anybody exists.
    "unready.title": ("Almost ready", "거의 준비되었습니다"),
    "unready.text": (
        "Nobody can sign in yet. The first administrator is made with the set-up link, which works once.",
        "아직 로그인할 수 있는 사람이 없습니다. 설정 링크를 열어 첫 관리자를 만드세요. 링크는 한 번만 쓸 수 있습니다.",
    ),
    "unready.where": ("Where the link is", "링크가 있는 곳"),
    "unready.terminal": (
        "In the terminal where the server was started: the line that ends in {example}.",
        "서버를 시작한 터미널에 있습니다. {example} 모양으로 끝나는 줄을 찾으세요.",
    ),
    "unready.file": (
        "Without a terminal: in the file {file} in the server’s home directory, which only its owner can read.",
        "터미널이 없다면 서버 홈 디렉터리의 {file} 파일에 있습니다. 소유자만 읽을 수 있습니다.",
    ),
    "unready.again": (
        "It works for 24 hours. Starting the server again makes a new one.",
        "링크는 24시간 동안 쓸 수 있습니다. 서버를 다시 시작하면 새 링크가 나옵니다.",
    ),
    # Making the first administrator.
    "set_up.title": ("Create the administrator", "관리자 만들기"),
    "set_up.text": (
        "This account can see and end everybody’s sessions. The link you opened works only once.",
        "이 계정은 모든 사람의 로그인을 보고 끝낼 수 있습니다. 이 링크는 한 번만 쓸 수 있습니다.",
    ),
    "set_up.submit": ("Create and sign in", "만들고 로그인하기"),
    "set_up.gone": ("This link does not work", "사용할 수 없는 링크입니다"),
    "set_up.gone_text": (
        "It was used already, is older than 24 hours, or was replaced by a newer one.",
        "이미 사용했거나, 24시간이 지났거나, 새 링크로 바뀌었습니다.",
    ),
    "set_up.gone_cure": (
        "While there is no administrator, starting the server again makes a new link.",
        "아직 관리자가 없다면 서버를 다시 시작해 새 링크를 받으세요.",
    ),
    # Signing in.
    "sign_in.title": ("Sign in", "로그인"),
    "sign_in.submit": ("Sign in", "로그인"),
    "sign_in.already": ("You are signed in as {name}.", "{name}님으로 로그인되어 있습니다."),
    "sign_in.go_on": ("Go on as {name}", "{name}님으로 계속하기"),
    "sign_in.as_other": ("Sign in as somebody else", "다른 계정으로 로그인"),
    "sign_in.other_text": (
        "This ends the present session in this browser.",
        "이 브라우저의 지금 로그인은 끝납니다.",
    ),
    "sign_in.signed_out": ("You are signed out.", "로그아웃했습니다."),
    "sign_in.not_kept": (
        "You are signed out in this browser. The server could not record it; please sign in again later and end "
        "the session there.",
        "이 브라우저에서는 로그아웃했지만 서버에 기록하지 못했습니다. 나중에 다시 로그인해 그 로그인을 끝내 주세요.",
    ),
    # Proving that it is the same person.
    "confirm.title": ("Confirm that it is you", "본인인지 확인해 주세요"),
    "confirm.refused": (
        "This session was used from another place and refused there. To be sure that it is you who is here, please "
        "give the password. Every copy of this session stops working with it.",
        "이 로그인을 다른 곳에서 사용하려고 해서 막았습니다. 지금 여기 있는 사람이 본인인지 확인할 수 있게 비밀번호를 "
        "입력해 주세요. 확인하면 복사된 로그인은 모두 쓸 수 없게 됩니다.",
    ),
    "confirm.elsewhere": (
        "This session was opened in another place. To go on from here, please give the password of its account.",
        "이 로그인은 다른 곳에서 시작되었습니다. 여기에서 계속하려면 그 계정의 비밀번호를 입력해 주세요.",
    ),
    "confirm.again": (
        "To go on, please give your password once more.",
        "계속하려면 비밀번호를 한 번 더 입력해 주세요.",
    ),
    "confirm.when": ("Where that was", "사용하려고 한 곳"),
    "confirm.submit": ("Confirm and go on", "확인하고 계속하기"),
    "confirm.leave": ("Not your session? Sign out", "내 로그인이 아니면 로그아웃"),
    "confirm.wrong": ("This password is not right.", "비밀번호가 맞지 않습니다."),
    "refused_here.title": ("This session cannot be used from here", "여기에서는 쓸 수 없는 로그인입니다"),
    "refused_here.text": (
        "It was opened in another place. From here it is refused for another {count} min.",
        "다른 곳에서 시작된 로그인입니다. 여기에서는 앞으로 {count}분 동안 쓸 수 없습니다.",
    ),
    "refused_here.cure": (
        "If it is yours, sign in anew below.",
        "본인이라면 아래에서 새로 로그인하세요.",
    ),
    # Going on with a refresh cookie.
    "take_up.title": ("Go on where you were", "이어서 하기"),
    "take_up.text": (
        "This browser still has a sign-in that can go on. Nothing happens before you say so.",
        "이 브라우저에 이어서 쓸 수 있는 로그인이 남아 있습니다. 버튼을 누르기 전에는 아무 일도 일어나지 않습니다.",
    ),
    "take_up.submit": ("Continue", "계속하기"),
    # Arriving from another site.
    "arrival.title": ("One moment", "잠시만 기다려 주세요"),
    "arrival.text": (
        "You came from another site. Opening the page.",
        "다른 사이트에서 오셨습니다. 화면을 여는 중입니다.",
    ),
    "arrival.go_on": ("Go on", "계속하기"),
    # Fields.
    "field.name": ("Name", "이름"),
    "field.password": ("Password", "비밀번호"),
    "field.new_password": ("New password", "새 비밀번호"),
    "field.current_password": ("Current password", "현재 비밀번호"),
    "field.again": ("The same password again", "비밀번호 확인"),
    "field.password_hint": (
        "At least {minimum} characters. A few words that do not belong together are good; spaces are welcome.",
        "{minimum}자 이상. 서로 관계없는 낱말 몇 개를 이어 쓰면 좋습니다. 띄어쓰기도 쓸 수 있습니다.",
    ),
    "field.name_hint": (
        "How you sign in: a name or an e-mail address, without spaces.",
        "로그인할 때 쓰는 이름이나 이메일 주소입니다. 띄어쓰기 없이 적어 주세요.",
    ),
    # The account.
    "account.title": ("Your account", "내 계정"),
    "account.as": ("Signed in as {name}", "{name}님으로 로그인됨"),
    "account.sessions": ("Where you are signed in", "로그인된 곳"),
    "account.sessions_text": (
        "If you do not know one of these, end it and change your password.",
        "모르는 기기가 있으면 로그인을 끝내고 비밀번호를 바꾸세요.",
    ),
    "account.device": ("Device", "기기"),
    "account.network": ("Network", "네트워크"),
    "account.created": ("Signed in", "로그인한 때"),
    "account.seen": ("Last seen", "마지막 사용"),
    "account.action": ("Action", "동작"),
    "account.this": ("This one", "지금 이 기기"),
    "account.end": ("End", "끝내기"),
    "account.end_one": ("End the session: {device}, {network}", "로그인 끝내기: {device}, {network}"),
    "account.end_others": ("End all others", "다른 로그인 모두 끝내기"),
    "account.only_one": ("You are signed in nowhere else.", "다른 곳에는 로그인되어 있지 않습니다."),
    "account.password": ("Change the password", "비밀번호 바꾸기"),
    "account.password_text": (
        "Everywhere else you will be signed out.",
        "바꾸면 다른 곳에서는 모두 로그아웃됩니다.",
    ),
    "account.password_submit": ("Change the password", "비밀번호 바꾸기"),
    "account.told": ("What happened lately", "최근에 있었던 일"),
    "account.told_text": (
        "If one of these was not you, change your password.",
        "본인이 한 일이 아닌 것이 있으면 비밀번호를 바꾸세요.",
    ),
    "account.told_missing": (
        "What happened lately cannot be shown at the moment.",
        "최근에 있었던 일을 지금은 보여 드릴 수 없습니다.",
    ),
    "told.block": (
        "Your session was used from another place and refused there: {place}.",
        "다른 곳에서 내 로그인을 사용하려고 해서 막았습니다. {place}",
    ),
    "told.step_up": (
        "Your session was used from another place, and the password was asked for there: {place}.",
        "다른 곳에서 내 로그인을 사용하려고 해서 비밀번호를 물었습니다. {place}",
    ),
    "told.revoke": (
        "Your session was used from another place and ended: {place}.",
        "다른 곳에서 내 로그인을 사용하려고 해서 로그인을 끝냈습니다. {place}",
    ),
    "told.notify": (
        "Your session was used from another place: {place}.",
        "다른 곳에서 내 로그인을 사용했습니다. {place}",
    ),
    "told.family": (
        "Your session was used over another kind of address for the first time: {place}.",
        "내 로그인이 다른 종류의 주소로 처음 사용되었습니다. {place}",
    ),
    "told.new_device": (
        "Somebody with your password signed in on a device that was not known: {place}.",
        "비밀번호를 아는 사람이 처음 보는 기기에서 로그인했습니다. {place}",
    ),
    "told.new_country": (
        "Somebody with your password signed in from a country where you had not been: {place}.",
        "비밀번호를 아는 사람이 처음 보는 나라에서 로그인했습니다. {place}",
    ),
    "told.impossible_travel": (
        "Somebody with your password signed in too far away for you to have got there: {place}.",
        "비밀번호를 아는 사람이 그 시간에 갈 수 없을 만큼 먼 곳에서 로그인했습니다. {place}",
    ),
    "told.velocity": (
        "Wrong passwords were tried for your account, many in a short time: {place}.",
        "짧은 시간에 틀린 비밀번호가 여러 번 입력되었습니다. {place}",
    ),
    "told.refresh_reuse": (
        "A part of your sign-in was used twice, as happens when it was copied: {place}.",
        "로그인의 일부가 두 번 쓰였습니다. 복사되었을 때 생기는 일입니다. {place}",
    ),
    "told.unusual": (
        "Something about your account was unusual: {place}.",
        "계정에 평소와 다른 일이 있었습니다. {place}",
    ),
    "told.another_browser": ("another browser", "다른 브라우저"),
    "told.overruled": (
        "Somebody with your password ended {count} of your sessions to sign in: {place}.",
        "비밀번호를 아는 사람이 로그인하려고 내 로그인 {count}개를 끝냈습니다. {place}",
    ),
    "told.contest": (
        "Two browsers kept signing each other out, so the next sign-in had to choose: {place}.",
        "두 브라우저가 서로를 계속 로그아웃시켜서 다음 로그인에서는 고르게 했습니다. {place}",
    ),
    # Too many sessions.
    "limit.title": ("You are signed in elsewhere", "다른 곳에 로그인되어 있습니다"),
    "limit.ask": (
        "You cannot be signed in on more devices at once. Choose what to end, and you are signed in here.",
        "동시에 로그인할 수 있는 기기 수를 넘었습니다. 끝낼 로그인을 고르면 여기에 로그인됩니다.",
    ),
    "limit.refused": (
        "As long as these sessions are open, nobody else is let in. You have given the password, so you may end them "
        "and sign in here.",
        "이 로그인이 열려 있는 동안에는 새로 로그인할 수 없습니다. "
        "비밀번호를 입력하셨으므로 끝내고 여기에 로그인할 수 있습니다.",
    ),
    "limit.not_you": (
        "If you do not know one of these, end it, and change your password once you are in.",
        "모르는 기기가 있으면 끝내고, 로그인한 뒤 비밀번호를 바꾸세요.",
    ),
    "limit.choose": ("Sessions to end, at least {count}", "끝낼 로그인, {count}개 이상"),
    "limit.room": ("Sessions to end, if any", "끝낼 로그인 (없어도 됩니다)"),
    "limit.again": (
        "The list has changed, or too few were chosen. Nothing was ended.",
        "목록이 바뀌었거나 고른 수가 모자랍니다. 아무것도 끝내지 않았습니다.",
    ),
    "limit.over": (
        "That took too long or was used already. Please sign in again.",
        "시간이 지났거나 이미 쓴 화면입니다. 다시 로그인하세요.",
    ),
    "limit.submit": ("End these and sign in", "고른 로그인을 끝내고 로그인"),
    "limit.leave": ("Do not sign in", "로그인하지 않기"),
    # What was done.
    "done.ended": ("The session was ended.", "로그인을 끝냈습니다."),
    "done.ended_many": ("{count} sessions were ended.", "로그인 {count}개를 끝냈습니다."),
    "done.ended_none": ("There was nothing left to end.", "끝낼 로그인이 없습니다."),
    "done.password": (
        "The password was changed. You are signed out everywhere else.",
        "비밀번호를 바꿨습니다. 다른 곳에서는 모두 로그아웃되었습니다.",
    ),
    "done.already_ended": ("This session had ended already.", "이미 끝난 로그인입니다."),
    # Devices and places.
    "device.both": ("{browser} on {system}", "{system}의 {browser}"),
    "device.unknown": ("Unknown device", "알 수 없는 기기"),
    "network.unknown": ("Unknown", "알 수 없음"),
    # Why a session ended.
    "ended.title": ("You were signed out", "로그아웃되었습니다"),
    "ended.sign_in": ("Sign in again", "다시 로그인"),
    "ended.at": ("That was at {time}.", "끝난 시각: {time}"),
    "ended.at_from": ("That was at {time}, from {place}.", "끝난 시각: {time}, 로그인한 곳: {place}"),
    "reason.logout": ("You signed out.", "로그아웃했습니다."),
    "reason.session_limit": (
        "You signed in on another device, and this session had to give way. If that was not you, sign in and change "
        "your password.",
        "다른 기기에서 로그인해 이 로그인이 끝났습니다. 본인이 한 일이 아니라면 로그인해 비밀번호를 바꾸세요.",
    ),
    "reason.idle_timeout": (
        "Nothing was done in this browser for a while, so the session was ended for your safety.",
        "이 브라우저에서 한동안 아무 동작이 없어 안전을 위해 로그인을 끝냈습니다.",
    ),
    "reason.absolute_timeout": (
        "The longest time for one session was reached. Please sign in again.",
        "한 번 로그인해 쓸 수 있는 시간이 지났습니다. 다시 로그인해 주세요.",
    ),
    "reason.ended_by_user": (
        "You ended this session from another device. If that was not you, sign in and change your password.",
        "다른 기기에서 이 로그인을 끝냈습니다. 본인이 한 일이 아니라면 로그인해 비밀번호를 바꾸세요.",
    ),
    "reason.password_changed": (
        "The password of this account was changed.",
        "이 계정의 비밀번호가 바뀌었습니다.",
    ),
    "reason.account_disabled": (
        "The session was ended by an administrator.",
        "관리자가 로그인을 끝냈습니다.",
    ),
    "reason.refresh_reused": (
        "A part of this sign-in was used twice, as happens when it was copied. It was ended for your safety. If you "
        "did not restore a backup of this browser, change your password.",
        "이 로그인의 일부가 두 번 쓰였습니다. 복사되었을 때 생기는 일이라 안전을 위해 끝냈습니다. "
        "이 브라우저를 백업에서 되돌린 것이 아니라면 비밀번호를 바꾸세요.",
    ),
    "reason.other_place": (
        "This session was used from another place, so it was ended for your safety. If that was not you, sign in and "
        "change your password.",
        "다른 곳에서 이 로그인을 사용하려고 해서 안전을 위해 끝냈습니다. "
        "본인이 한 일이 아니라면 로그인해 비밀번호를 바꾸세요.",
    ),
    "reason.unusual_sign_in": (
        "Somebody signed in to your account in an unusual way, so your other sessions were ended for your safety. If "
        "that was not you, sign in and change your password.",
        "계정에 평소와 다른 로그인이 있어 안전을 위해 다른 로그인을 모두 끝냈습니다. "
        "본인이 한 일이 아니라면 로그인해 비밀번호를 바꾸세요.",
    ),
    "reason.other": ("The session was ended: {reason}", "로그인이 끝났습니다: {reason}"),
    # Why a name or a password cannot be had.
    "name.not_text": ("Please type a name.", "이름을 입력하세요."),
    "name.empty": ("Please type a name.", "이름을 입력하세요."),
    "name.too_long": (
        "This name is too long: at most 128 characters.",
        "이름이 너무 깁니다. 128자까지 쓸 수 있습니다.",
    ),
    "name.characters": ("This name has characters that cannot be used.", "이름에 쓸 수 없는 글자가 있습니다."),
    "name.spaces": ("A name has no spaces.", "이름에는 띄어쓰기를 쓸 수 없습니다."),
    "name.taken": ("Somebody has this name already.", "이미 있는 이름입니다."),
    "password.not_text": ("Please type a password.", "비밀번호를 입력하세요."),
    "password.not_unicode": (
        "This password has characters that cannot be used.",
        "비밀번호에 쓸 수 없는 글자가 있습니다.",
    ),
    "password.too_short": (
        "This password is too short: at least {minimum} characters.",
        "비밀번호가 너무 짧습니다. {minimum}자 이상이어야 합니다.",
    ),
    "password.too_long": (
        "This password is too long: at most {maximum} characters.",
        "비밀번호가 너무 깁니다. {maximum}자까지 쓸 수 있습니다.",
    ),
    "password.repeated": (
        "This password repeats itself and would be guessed soon.",
        "같은 글자가 되풀이되어 쉽게 알아낼 수 있는 비밀번호입니다.",
    ),
    "password.common": (
        "This password is among the first that are guessed.",
        "가장 먼저 추측해 보는 흔한 비밀번호입니다.",
    ),
    "password.context": (
        "This password is made of your name or the name of this service.",
        "이름이나 서비스 이름으로 만든 비밀번호는 쓸 수 없습니다.",
    ),
    "password.blocked": (
        "This password is known from a leak and cannot be used.",
        "유출된 적이 있는 비밀번호라서 쓸 수 없습니다.",
    ),
    "password.differ": ("The two passwords are not the same.", "두 비밀번호가 서로 다릅니다."),
    "password.wrong_current": ("The current password is not right.", "현재 비밀번호가 맞지 않습니다."),
    # How long to wait.
    "wait.seconds": (
        "Too many attempts. Please try again in {count} s.",
        "시도가 너무 많습니다. {count}초 뒤에 다시 시도하세요.",
    ),
    "wait.minutes": (
        "Too many attempts. Please try again in {count} min.",
        "시도가 너무 많습니다. {count}분 뒤에 다시 시도하세요.",
    ),
    "blocked.seconds": (
        "Signing in from here is refused for {count} s. A browser you have used before can sign in.",
        "여기에서는 {count}초 동안 로그인할 수 없습니다. 전에 로그인한 적이 있는 브라우저에서는 로그인할 수 있습니다.",
    ),
    "blocked.minutes": (
        "Signing in from here is refused for {count} min. A browser you have used before can sign in.",
        "여기에서는 {count}분 동안 로그인할 수 없습니다. 전에 로그인한 적이 있는 브라우저에서는 로그인할 수 있습니다.",
    ),
    # Errors, by their code.
    "problem.error": ("Something went wrong.", "문제가 생겼습니다."),
    "problem.configuration": (
        "The service is not configured correctly.",
        "서비스 설정이 올바르지 않습니다.",
    ),
    "problem.migration_required": (
        "The service is not configured correctly.",
        "서비스 설정이 올바르지 않습니다.",
    ),
    "problem.store_unavailable": (
        "The service is busy. Please try again in a moment.",
        "지금 서비스를 쓸 수 없습니다. 잠시 뒤에 다시 시도하세요.",
    ),
    "problem.session": ("Something went wrong.", "문제가 생겼습니다."),
    "problem.login_required": ("Please sign in.", "로그인하세요."),
    "problem.session_ended": (
        "This session has ended. Please sign in again.",
        "로그인이 끝났습니다. 다시 로그인하세요.",
    ),
    "problem.session_gone": (
        "This session ended while the request was running.",
        "요청을 처리하는 동안 로그인이 끝났습니다.",
    ),
    "problem.session_conflict": (
        "The session was changed by another request.",
        "다른 요청이 로그인 상태를 바꿨습니다.",
    ),
    "problem.session_closed": ("Something went wrong.", "문제가 생겼습니다."),
    "problem.session_not_loaded": ("Something went wrong.", "문제가 생겼습니다."),
    "problem.session_limit": (
        "You are signed in on too many devices.",
        "너무 많은 기기에서 로그인되어 있습니다.",
    ),
    "problem.value_refused": ("A value is not acceptable.", "받을 수 없는 값이 있습니다."),
    "problem.record_too_large": ("The session holds too much.", "로그인에 저장된 내용이 너무 많습니다."),
    "problem.cookie_too_large": ("Something went wrong.", "문제가 생겼습니다."),
    "problem.forbidden": ("You may not do this.", "권한이 없습니다."),
    "problem.step_up_required": ("Please confirm that it is you.", "본인인지 확인해 주세요."),
    "problem.place_refused": (
        "This session was opened elsewhere and cannot be used from here.",
        "다른 곳에서 시작된 로그인이라 여기에서는 쓸 수 없습니다.",
    ),
    "problem.sign_in_blocked": (
        "Signing in from here is refused for a while. A browser you have used before can sign in.",
        "여기에서는 잠시 로그인할 수 없습니다. 전에 로그인한 적이 있는 브라우저에서는 로그인할 수 있습니다.",
    ),
    "problem.cross_origin": (
        "This request came from another site.",
        "다른 사이트에서 보낸 요청이라 처리하지 않았습니다.",
    ),
    "problem.throttled": (
        "Too many attempts. Please wait a moment.",
        "시도가 너무 많습니다. 잠시 기다려 주세요.",
    ),
    "problem.invalid_credentials": (
        "Name or password are not right.",
        "이름이나 비밀번호가 맞지 않습니다.",
    ),
    "problem.bad_request": ("This request cannot be read.", "요청을 읽을 수 없습니다."),
    "problem.body_too_large": ("This request is too large.", "요청이 너무 큽니다."),
    "problem.unsupported_media_type": (
        "This request is of a kind that is not taken here.",
        "여기서 받지 않는 형식의 요청입니다.",
    ),
    "problem.invalid_token": ("The access token is not valid.", "액세스 토큰이 유효하지 않습니다."),
    "problem.revocations_unknown": (
        "The service is busy. Please try again in a moment.",
        "지금 서비스를 쓸 수 없습니다. 잠시 뒤에 다시 시도하세요.",
    ),
    "problem.refresh_invalid": ("Please sign in again.", "다시 로그인하세요."),
    "problem.refresh_reused": ("Please sign in again.", "다시 로그인하세요."),
    "problem.cursor_lost": ("Begin again with a snapshot.", "처음부터 다시 받으세요."),
    "problem.not_found": ("There is nothing here.", "여기에는 아무것도 없습니다."),
    "problem.method_not_allowed": (
        "This address does not take that method.",
        "이 주소에서는 그 방식을 쓸 수 없습니다.",
    ),
    "problem.password_unacceptable": (
        "This password cannot be used.",
        "쓸 수 없는 비밀번호입니다.",
    ),
}


def language_of(accept_language: str | None) -> Language:
    """Korean for whoever wants it more than English, else English. Never raises, whatever the header is."""
    best: Language = DEFAULT
    highest = 0.0
    for tag, quality in preferences(accept_language):
        language = _LANGUAGES.get(tag.partition("-")[0])
        if language is not None and quality > highest:
            best, highest = language, quality
    return best


def say(key: str, language: Language, **values: object) -> str:
    """One text with its values put in. Raises: KeyError for a key or a value that is missing."""
    english, korean = TEXTS[key]
    return (korean if language == "ko" else english).format_map(values)


def say_reason(reason: str, language: Language) -> str:
    """Why a session ended; an administrator's own words are shown as they are."""
    key = f"reason.{reason}"
    return say(key if key in TEXTS else "reason.other", language, reason=reason)


def reasons(language: Language) -> list[tuple[str, str]]:
    """Every reason that has a text of its own, with the text."""
    known = [key.removeprefix("reason.") for key in TEXTS if key.startswith("reason.") and key != "reason.other"]
    return [(reason, say_reason(reason, language)) for reason in known]


def say_problem(code: str, language: Language) -> str:
    """The text of an error code."""
    key = f"problem.{code}"
    return say(key if key in TEXTS else "problem.error", language)


def say_wait(seconds: int, language: Language) -> str:
    """How long somebody who tried too often has to wait; minutes are rounded up."""
    return _say_time("wait", seconds, language)


def say_blocked(seconds: int, language: Language) -> str:
    """How long a rule about risk refuses this place, to somebody who need not have tried often."""
    return _say_time("blocked", seconds, language)


def _say_time(key: str, seconds: int, language: Language) -> str:
    if seconds <= 90:
        return say(f"{key}.seconds", language, count=seconds)
    return say(f"{key}.minutes", language, count=-(-seconds // 60))


_LANGUAGES: Final[Mapping[str, Language]] = {"en": "en", "ko": "ko"}
